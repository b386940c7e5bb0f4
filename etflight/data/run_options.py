"""The options of a data module that a run's configuration or a model's checkpoint tells."""

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from etflight.checkpoint.specs import find_class
from etflight.data.base import ImageDataModule
from etflight.data.preprocessing import Preprocessing
from etflight.utils.errors import UserError
from etflight.utils.limits import refuse_names
from etflight.utils.yaml import read_yaml


def prepare_as_trained(data: Namespace, known: Preprocessing | None) -> None:
    """Let the checkpoint decide how images are sized and normalised wherever the user has not.

    Args:
        data: The parsed option of the data module, changed in place; an option that is null counts as not given.
        known: What the checkpoint knows of its images, or None.
    """
    cls: Any = find_class({"class_path": data.class_path}, ImageDataModule)
    if cls is None or known is None:
        return
    for name, value in cls.options_for(known).items():
        if name in data.init_args and data.init_args[name] is None:
            data.init_args[name] = value
    for inner in vars(data.init_args).values():
        if isinstance(inner, Namespace) and "class_path" in inner and "init_args" in inner:
            prepare_as_trained(inner, known)  # the set that a ClassSubset takes its images from


def data_section(path: Path) -> dict[str, Any]:
    """What a configuration file says of the data, under `data`; empty if it says nothing."""
    content: Any = read_yaml(path)
    return {"data": content["data"]} if isinstance(content, dict) and "data" in content else {}


def refuse_imports(config: Path) -> None:
    """Refuse a run's configuration for which code would be imported: the user has named the run, and not this file.

    Raises:
        UserError: Its data are of a class that has not been imported, or an argument of theirs could name code.
    """

    def check(spec: Any) -> None:
        spec = {"class_path": spec} if isinstance(spec, str) else spec
        path, arguments = (
            (spec.get("class_path"), spec.get("init_args") or {}) if isinstance(spec, dict) else (None, {})
        )
        if not isinstance(path, str) or not isinstance(arguments, dict):
            return  # the parser says what is wrong with it
        cls = find_class({"class_path": path if "." in path else f"etflight.data.{path}"}, ImageDataModule)
        if cls is None or spec.keys() - {"class_path", "init_args"}:
            raise UserError(f"{config} has data of {path!r}, which has not been imported: import its module")
        inner = {name: value for name, value in arguments.items() if isinstance(value, dict) and "class_path" in value}
        refuse_names(cls, {name: value for name, value in arguments.items() if name not in inner}, str(config))
        for value in inner.values():
            check(value)

    for data in data_section(config).values():
        check(data)
