"""Private names of Lightning, each in one small function."""

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.strategies import DDPStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

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


def forks_processes(strategy: Strategy) -> bool:
    """Whether a strategy starts its processes by Python's `multiprocessing`, as in notebooks; touches its launcher's private class."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def before_batch_transfer(module: LightningModule, batch: Any) -> Any:
    """What the data module's and the module's `on_before_batch_transfer` make of a batch.

    Touches `LightningModule._on_before_batch_transfer`.
    """
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def ignore_own_deprecations() -> None:
    """Hide a warning about what Lightning itself calls, which no user can mend: torch's of `LeafSpec`, in Lightning's `_pytree`."""
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning, r"lightning\.pytorch\.utilities\._pytree")


def let_parameters_be_unused(strategy: object) -> None:
    """Let DDP know all parameters from the start, and wait in no step for those without gradients; nothing for another strategy.

    Touches `DDPStrategy._ddp_kwargs`.
    """
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True


def uploads_checkpoints(logger: WandbLogger) -> bool:
    """Whether a logger was made with `log_model`. Touches `WandbLogger._log_model`."""
    return bool(logger._log_model)


# --- the state of the loops in a checkpoint ----------------------------------------------------------------------------
# `checkpoint["loops"]["fit_loop"]` has "epoch_progress", "epoch_loop.batch_progress", and in "state_dict" the loaders' own states


def set_back_step(loops: dict[str, Any]) -> None:
    """Set the counters to where the training step that the trainer has begun had not begun."""
    batches = loops["epoch_loop.batch_progress"]
    batches["total"]["ready"] -= 1
    batches["current"]["ready"] -= 1
    for loader in loops["state_dict"].get("combined_loader", []):
        loader["served"] = batches["current"]["ready"]


def set_back_epoch(loops: dict[str, Any]) -> None:
    """Set the counters to where the epoch that the trainer has begun had not begun."""
    loops["epoch_progress"]["total"]["ready"] -= 1
    loops["epoch_progress"]["current"]["ready"] -= 1


def batches_done(loops: dict[str, Any]) -> int:
    """How many batches of the epoch have been trained; 0 between two epochs."""
    is_within = any(loader["served"] for loader in loops["state_dict"].get("combined_loader", []))
    return int(loops["epoch_loop.batch_progress"]["current"]["completed"]) if is_within else 0


def set_batches_done(loops: dict[str, Any], done: int) -> None:
    """Set the counters to where so many batches of the epoch have been trained."""
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], done)
    batches["is_last_batch"] = False
    for loader in loops["state_dict"].get("combined_loader", []):
        loader["served"] = done


def unlike_loops(trainer: Trainer, saved: Any) -> str | None:
    """What of a checkpoint's "loops" the trainer cannot go on from: a place and what is there; None if nothing."""
    # the loaders' states are theirs to read
    return _unlike(saved, {"fit_loop": trainer.fit_loop.state_dict() | {"state_dict": {}}}, "its loops")


def _unlike(saved: Any, own: Any, place: str) -> str | None:
    if not isinstance(own, dict):
        fine = type(saved) is type(own) and not (isinstance(saved, int) and saved < 0)
        return None if fine else f"{place} is {saved!r:.60}"
    if not isinstance(saved, dict):
        return f"{place} is {saved!r:.60}"
    if missing := own.keys() - saved.keys():
        return f"{place} lacks {min(missing)}"
    return next((wrong for name in own if (wrong := _unlike(saved[name], own[name], f"{place}.{name}"))), None)
