"""The configuration files that come with the package."""

import os
from pathlib import Path

# a link to configs/ in a checkout, a folder in an installed package
SHIPPED = Path(__file__).parents[1] / "cli" / "shipped"


def find_config(name: str | Path) -> Path:
    """Find a configuration file: the user's own, or else the shipped one of that name.

    Args:
        name: A path; "configs/data/digits.yaml", "data/digits.yaml" and "data/digits" all name the same shipped file.

    Returns:
        The path of the file; the given one if there is neither.
    """
    path = Path(name)
    if path.exists() or path.is_absolute():
        return path
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    shipped = SHIPPED.joinpath(*parts)
    shipped = shipped if shipped.suffix == ".yaml" else shipped.with_name(f"{shipped.name}.yaml")
    inside = os.path.normpath(shipped).startswith(f"{SHIPPED}{os.sep}")
    return shipped if inside and shipped.is_file() else path


def short_name(file: Path) -> Path:
    """The name by which `find_config` finds a shipped file in any folder that has no file of that name.

    Args:
        file: An absolute path without links.

    Returns:
        Such as configs/arms/ce.yaml; the given path if the file is not a shipped one, or the current folder has another of its name.
    """
    shipped = SHIPPED.resolve()
    if not file.is_relative_to(shipped):
        return file
    name = Path("configs") / file.relative_to(shipped)
    return name if find_config(name).resolve() == file else file


def shipped_configs() -> list[Path]:
    """The paths of all shipped files relative to their folder, sorted."""
    return sorted(file.relative_to(SHIPPED) for folder in SHIPPED.iterdir() for file in folder.glob("*.yaml"))
