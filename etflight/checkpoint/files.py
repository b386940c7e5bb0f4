"""Writing checkpoints completely, and reading those of others as plain data or not at all."""

import inspect
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from torch import Tensor

from etflight.checkpoint.old_names import with_todays_names
from etflight.utils.errors import UserError, argument, brief, let_through
from etflight.utils.files import replacing
from etflight.utils.limits import fits, refuse_aliases, texts

_MAX_VALUES = 10_000_000
_EXAMPLE = "a file such as RUN/checkpoints/last.ckpt"
# the shapes of the entries that Lightning and this package use without checking them, as `fits` takes them; a checkpoint may lack some
_SHAPES: dict[str, Any] = {
    "state_dict": {str: Tensor},
    "hyper_parameters": {str: object},
    "callbacks": dict,
    "loops": dict,
    "etflight": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "epoch": int,
    "global_step": int,
    "pytorch-lightning_version": str,
    "class_names": ([str], type(None)),
}


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Load a file of weights as named tensors; no code in it can run.

    Args:
        path: A `.safetensors` file, or one of `torch.save` with a state dict or with a checkpoint that holds a state dict under one of
            timm's and torchvision's names (`state_dict`, `model`, …).

    Raises:
        UserError: The file is missing, damaged or not on this machine, holds anything but tensors and plain data, or has no state dict.
    """
    from timm.models import load_state_dict  # timm takes a second, which `--help` need not wait for

    state: dict[str, Tensor] = _read(
        path, "weights", "FILE.safetensors or one of torch.save", lambda file: load_state_dict(file, weights_only=True)
    )
    if not state or not fits(state, {str: Tensor}):
        raise UserError(f"weights {path} are not a state dict: save one with torch.save(model.state_dict(), FILE)")
    return state


def misfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Explain why a state dict cannot be loaded: missing names, names that have no place, or other shapes.

    Args:
        given: The state dict to load.
        own: The module's own state dict.

    Returns:
        Part of a sentence about the given state dict; None if it fits.
    """
    missing = [key for key in own if key not in given]
    surplus = sorted(given.keys() - own.keys())
    shapes = [
        f"{key} is {list(given[key].shape)}, not {list(value.shape)}"
        for key, value in own.items()
        if key in given and given[key].shape != value.shape
    ]
    problems = []
    for text, names in (
        ("it has no {}", missing),
        ("it has a {}, with no place here", surplus),
        ("its {}", shapes),
    ):
        if names:
            problems.append(text.format(names[0] + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")))
    return "; ".join(problems) or None


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Load a Lightning checkpoint as tensors and plain data; no code in it can run.

    Args:
        path: A file on this machine.
        map_location: The device for its tensors, as in `torch.load`.

    Raises:
        UserError: The file is missing, truncated, not a checkpoint or not on this machine, holds anything but tensors and plain data, was
            made by another program, or names files that a callback would delete.
    """
    checkpoint: dict[str, Any] = _read(
        path, "checkpoint", _EXAMPLE, lambda file: torch.load(file, map_location=map_location, weights_only=True)
    )
    if not isinstance(checkpoint, dict) or not {"state_dict", "hyper_parameters"} <= checkpoint.keys():
        raise UserError(
            f"checkpoint {path} is not one of etflight's: it has no state_dict with hyper_parameters: give {_EXAMPLE} "
            f"(weights alone go into a new model's backbone by {argument('fine_tuning.weights')})"
        )
    _check_contents(path, checkpoint)
    return with_todays_names(checkpoint)


def refuse_others(path: str | Path, checkpoint: Mapping[str, Any], cls: type) -> None:
    """Refuse a checkpoint of another program's model, recognised by hyper-parameters that our class does not have.

    Args:
        path: The file, for the error.
        checkpoint: The content, as `read_checkpoint` returns it.
        cls: The model's class.

    Raises:
        UserError: The checkpoint has such hyper-parameters.
    """
    taken = inspect.signature(cls).parameters
    others = checkpoint["hyper_parameters"].keys() - {*taken, "_instantiator"}
    if others and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        raise UserError(
            f"checkpoint {path} is not one of a {cls.__name__}: it has the hyper-parameter {min(others)!r}: give {_EXAMPLE}"
        )


def _read(path: str | Path, what: str, example: str, load: Callable[[str], Any]) -> Any:
    """Load a file on this machine, or raise a `UserError` that says what it is and gives an example."""
    if re.match(r"[A-Za-z][\w+.-]+:|.*::", str(path)):  # at least two letters, because C: is a drive
        raise UserError(
            f"{what} {path} is not a file on this machine: download it first, and give the path of the file"
        )
    if not Path(path).is_file():
        reason = "is a folder" if Path(path).is_dir() else "does not exist"
        raise UserError(f"{what} {path} {reason}: give the path of {example}")
    try:
        # torch.save compresses nothing, so what unpacks to more is made to fill the memory
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > Path(path).stat().st_size:
                raise ValueError("it unpacks to more than its size")
        with warnings.catch_warnings():  # torch's would come before the error
            warnings.simplefilter("ignore")
            return load(str(path))
    except Exception as error:  # a damaged or hostile file can cause any of them
        let_through(error)
        if isinstance(error, PermissionError):
            raise UserError(f"{what} {path} cannot be read ({error.strerror}): mend its permissions") from error
        if "Attempting to deserialize object on" in str(error):  # a device that this machine lacks
            raise UserError(f"{what} {path}: {brief(error, 120)}: give cpu as map_location") from error
        raise UserError(
            f"{what} {path} was refused and nothing in it was run: it is damaged or cut short, or holds more than tensors and plain data: "
            f"give {example}"
        ) from error


def _check_contents(path: str | Path, checkpoint: dict[str, Any]) -> None:
    try:
        refuse_aliases(checkpoint, _MAX_VALUES)
    except UserError as error:
        raise damaged(path, str(error)) from None
    for key, shape in _SHAPES.items():
        if key in checkpoint and not fits(checkpoint[key], shape):
            raise damaged(path, f"its {key} is {checkpoint[key]!r:.60}")
    for name in ("num_classes", "backbone"):
        if name not in checkpoint["hyper_parameters"]:
            raise damaged(path, f"its hyper_parameters have no {name}")
    for text in texts(checkpoint.get("callbacks")):
        # Lightning's ModelCheckpoint deletes the files, and folders, that its saved state calls its earlier checkpoints
        if ".." in PurePath(text.replace("\\", "/")).parts or "::" in text or "://" in text:
            raise UserError(
                f"checkpoint {path} was refused: the saved state of its callbacks names {text!r}, which is outside the run's own folder"
            )


def damaged(path: str | Path | None, reason: str) -> UserError:
    """Make the error for a checkpoint whose content cannot be used.

    Args:
        path: The checkpoint.
        reason: What is wrong with it, as a clause.
    """
    return UserError(f"checkpoint {path} is not one of etflight's, or is damaged: {reason}")


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and reads nothing but tensors and plain data.

    The file is written under a hidden name in its own folder, flushed to the disk, and gets its name last. So the previous checkpoint
    stays intact, whatever stops the process, the machine or the disk. (Lightning's own class collects the file in memory and moves it
    from the temporary folder, which is not atomic across file systems.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a file on this machine.

        Raises:
            UserError: The disk is full, or the folder cannot be written to.
        """
        try:
            with replacing(path) as partial, partial.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:
            let_through(error)
            reason = error if isinstance(error, OSError) else error.__context__
            if not isinstance(reason, OSError):  # torch wraps the error of the disk
                raise
            raise UserError(
                f"checkpoint {path} could not be written ({reason}): free some space or choose another folder, then resume; "
                "the checkpoint before it is intact"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        """Read as `read_checkpoint` does, whatever `weights_only` says.

        Raises:
            UserError: See `read_checkpoint`; or the file was not saved by a trainer.
        """
        checkpoint = read_checkpoint(path, map_location="cpu" if map_location is None else map_location)
        if "pytorch-lightning_version" not in checkpoint:
            raise damaged(path, "it has no pytorch-lightning_version")
        return checkpoint
