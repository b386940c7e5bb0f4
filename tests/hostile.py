"""What hostile files are made of."""

import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch


class Bomb:
    """Leaves a file `ran` in the current folder when it is unpickled."""

    def __reduce__(self) -> Any:
        return (exec, ("open('ran', 'w').close()",))


def save_packed(content: Any, path: Path | str) -> None:
    """As `torch.save`, but compressed: zeros take a thousandth of their size."""
    torch.save(content, plain := BytesIO())
    with zipfile.ZipFile(plain) as members, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name in members.namelist():
            packed.writestr(name, members.read(name))
