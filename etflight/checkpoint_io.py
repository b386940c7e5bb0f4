"""How the trainer writes and reads checkpoint files."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from etflight.checkpoints import damaged, read_checkpoint
from etflight.errors import UserError
from etflight.files import replacing


class SafeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads nothing but tensors and plain data.

    The file grows under a hidden name in the folder it is meant for, is flushed to the disk and takes its name last, so whatever stops
    the process, the machine or the disk leaves the previous checkpoint as it was. (Lightning's own collects the file in memory and
    moves it from the temporary folder, which is not atomic across file systems.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write to a file on this machine.

        Raises:
            UserError: the disk is full, or the folder cannot be written to.
        """
        try:
            with replacing(path) as partial, partial.open("wb") as stream:
                torch.save(checkpoint, stream)
        except (OSError, RuntimeError) as error:  # torch wraps what the disk says
            reason = error if isinstance(error, OSError) else error.__context__ or error
            raise UserError(
                f"checkpoint {path} could not be written ({reason}): free some space or choose another folder, then resume; "
                "the checkpoint before it is intact"
            ) from error

    def load_checkpoint(self, path: str | Path, map_location: Any = "cpu", weights_only: Any = None) -> dict[str, Any]:
        """Read as `read_checkpoint` does, whatever `weights_only` says.

        Raises:
            UserError: see `read_checkpoint`; or no trainer has saved it.
        """
        checkpoint = read_checkpoint(path, map_location="cpu" if map_location is None else map_location)
        if "pytorch-lightning_version" not in checkpoint:
            raise damaged(path, "it has no pytorch-lightning_version")
        return checkpoint
