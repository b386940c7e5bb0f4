"""Private names of Lightning, each in one small function."""

import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

_LAUNCHER = "lightning.fabric.strategies.launchers.subprocess_script"


def on_dead_process(tell: Callable[[int, int], None]) -> None:
    """Call `tell(rank, status)` in place of what Lightning's launcher logs when a process it started has died.

    Touches the name of the launcher's log and the text of its message.
    """

    def is_another_message(record: logging.LogRecord) -> bool:
        found = re.search(r"rank: (\d+)\].*terminated with code (-?\d+)", record.getMessage())
        if found is not None:
            tell(int(found[1]), int(found[2]))
        return found is None

    logging.getLogger(_LAUNCHER).addFilter(is_another_message)


def before_batch_transfer(module: "LightningModule", batch: Any) -> Any:
    """What the data module's and the module's `on_before_batch_transfer` make of a batch.

    Touches `LightningModule._on_before_batch_transfer`.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=0)
