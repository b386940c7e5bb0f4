"""Private names of Lightning, each in one small function."""

import logging
import re
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from lightning.fabric.utilities.data import AttributeDict
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
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


def ignore_remarks_on_hooks() -> None:
    """Hide the remark that a model's hook is used beside a data module, which is as it should be; touches its text."""
    warnings.filterwarnings("ignore", "You have overridden `on_before_batch_transfer` in `LightningModule` but")


def ignore_own_deprecations() -> None:
    """Hide torch's warning about `LeafSpec`, which no user can mend, because Lightning itself causes it in `_pytree`."""
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning, r"lightning\.pytorch\.utilities\._pytree")


def hide_tips() -> None:
    """Hide what Lightning recommends whenever a trainer is made.

    That are other products, in lines that begin with "Tip:", and `srun` wherever SLURM's client is installed.
    """
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", "The `srun` command is available")


def find_unused_parameters(strategy: object) -> None:
    """Let DDP know all parameters from the start, but not wait for those without gradients; do nothing with other strategies.

    Touches `DDPStrategy._ddp_kwargs`.
    """
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs["find_unused_parameters"] = True


def swap_with_average(callback: WeightAveraging, module: LightningModule) -> None:
    """Exchange a module's weights for their average, if there is one yet; touches `WeightAveraging._average_model` and `_swap_models`."""
    if callback._average_model is not None:
        callback._swap_models(module)


def only_passes(trainer: Trainer) -> bool:
    """Whether the trainer passes over images for BatchNorm's statistics alone, as after Lightning's `StochasticWeightAveraging`.

    Touches `_FitLoop._skip_backward`.
    """
    return trainer.fit_loop._skip_backward


def leave_out_anonymous(logger: WandbLogger) -> None:
    """Give W&B no `anonymous` unless the user did: it warns of that setting whatever its value. Touches `WandbLogger._wandb_init`."""
    if logger._wandb_init.get("anonymous") is None:
        logger._wandb_init.pop("anonymous", None)


# --- the state of the loops in a checkpoint ----------------------------------------------------------------------------
# `checkpoint["loops"]["fit_loop"]` has "epoch_progress", "epoch_loop.batch_progress", and in "state_dict" the loaders' own states


def set_back_step(loops: dict[str, Any]) -> None:
    """Set the counters back to before the training step that the trainer has begun."""
    batches = loops["epoch_loop.batch_progress"]
    batches["total"]["ready"] -= 1
    batches["current"]["ready"] -= 1
    for loader in loops["state_dict"].get("combined_loader", []):
        loader["served"] = batches["current"]["ready"]


def set_back_epoch(loops: dict[str, Any]) -> None:
    """Set the counters back to before the epoch that the trainer has begun."""
    loops["epoch_progress"]["total"]["ready"] -= 1
    loops["epoch_progress"]["current"]["ready"] -= 1


def batches_done(loops: dict[str, Any]) -> int:
    """The number of batches of the epoch that have been trained; 0 between two epochs."""
    is_within = any(loader["served"] for loader in loops["state_dict"].get("combined_loader", []))
    return int(loops["epoch_loop.batch_progress"]["current"]["completed"]) if is_within else 0


def set_batches_done(loops: dict[str, Any], done: int) -> None:
    """Set the counters to after `done` batches of the epoch."""
    batches = loops["epoch_loop.batch_progress"]
    batches["current"] = dict.fromkeys(batches["current"], done)
    batches["is_last_batch"] = False
    for loader in loops["state_dict"].get("combined_loader", []):
        loader["served"] = done


def replace_hyperparameters(module: LightningModule, plain: dict[str, Any]) -> None:
    """Make a module's hyper-parameters, also those that loggers get, exactly these; touches `_hparams` and `_hparams_initial`.

    `save_hyperparameters` would add to them, and compares them with the constructor's arguments, which fails for arrays.
    """
    module._hparams = AttributeDict(plain)
    vars(module)["_hparams_initial"] = deepcopy(module._hparams)
