"""Reading checkpoints that somebody else may have written: plain data or nothing."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from etflight.errors import UserError


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a Lightning checkpoint as tensors and plain data; no code in it can run.

    Args:
        path: a file on this machine.
        map_location: where its tensors go, as in `torch.load`.

    Raises:
        UserError: missing, truncated or no checkpoint; holding anything but tensors and plain data; or made by another program.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"checkpoint {path} does not exist: give the path of a file such as RUN/checkpoints/last.ckpt")
    if not zipfile.is_zipfile(file) and _is_zip_cut_short(file):
        raise UserError(f"checkpoint {path} is truncated: copy it again, or use an earlier one")
    try:
        checkpoint = torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {path} was refused and nothing in it was run: it is damaged or holds more than tensors and plain data "
            "(only load checkpoints that etflight wrote)"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        raise UserError(f"checkpoint {path} is truncated or damaged: copy it again, or use an earlier one") from error
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} is not one of etflight's: it has no state_dict with hyper_parameters")
    return checkpoint


def _is_zip_cut_short(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(2) == b"PK"
