"""The checkpoint from which a run continues as if it had never stopped, and the random numbers of each step."""

import os
import random
from typing import Any, Literal

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torchmetrics import Metric

from etflight.callbacks.collapse import NeuralCollapseMonitor
from etflight.runs.folder import last_checkpoint, run_folder
from etflight.runs.loggers import MetricsCSV
from etflight.utils.errors import UserError, argument
from etflight.utils.lightning_private import (
    batches_done,
    set_back_epoch,
    set_back_step,
    set_batches_done,
)
from etflight.utils.ranks import gather_objects
from etflight.utils.torchmetrics_private import add_saved_state
from etflight.utils.trainer import callbacks_of, data_module, is_trial_run

SavePoint = Literal["steps", "epochs", "end"]
KEY = "etflight"  # the entry of a checkpoint that this callback adds


class LastCheckpoint(Callback):
    """Keeps `<run folder>/checkpoints/last.ckpt`, saved only where a resumed run repeats the uninterrupted one bit by bit.

    These places lie *between* two steps or two epochs, when everything has been logged and nothing is pending: not while gradients
    accumulate, and not when a validation is due. A checkpoint holds what every rank has gathered in the epoch so far, and how many rows
    `metrics.csv` had. On another number of processes or with another batch size the epoch continues with the images that were not yet
    drawn; only a run of the same shape is repeated exactly.

    It must be the first callback, so that nothing of the next step or epoch has happened yet; only weight averages (SWA)
    come before it, because they may put the average into the model after the last epoch. For this reason it is not one of Lightning's
    `Checkpoint`s, which come last. Give the trainer `enable_checkpointing=False` unless it should keep checkpoints of its own as well.

    Args:
        every_n_steps: The number of optimizer steps after which it also saves within an epoch, at the next safe place; None saves after
            each epoch only.

    Raises:
        UserError: `every_n_steps` is below 1, or the disk is full.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"LastCheckpoint: every_n_steps is {every_n_steps}: give 1 or more, or leave it out")
        self.every_n_steps = every_n_steps
        self._between: SavePoint | None = None
        self._saved_step = 0
        self._saved_epoch = 0
        self._has_just_validated = False

    # --- when --------------------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._saved_step, self._saved_epoch = trainer.global_step, trainer.current_epoch
        self._has_just_validated = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation: resumed right after one within an epoch, the trainer would skip the bookkeeping of a batch."""
        self._has_just_validated = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the validation before this batch."""
        self._has_just_validated = False

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the epoch that has just ended; its last rows have been logged by now."""
        if trainer.current_epoch > self._saved_epoch and self.is_safe_between_epochs(trainer):
            self.save(trainer, "epochs")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save the step that has just ended."""
        n = self.every_n_steps
        due = n is not None and trainer.global_step // n > self._saved_step // n
        if (due or trainer.current_epoch > self._saved_epoch) and self.is_safe_between_steps(trainer, batch_idx):
            self.save(trainer, "steps")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last steps, after the other callbacks have finished their work."""
        for monitor in callbacks_of(trainer, NeuralCollapseMonitor):
            monitor.measure_final_weights(trainer, pl_module)
        if trainer.global_step > self._saved_step or trainer.current_epoch > self._saved_epoch:
            self.save(trainer, "end")

    def is_safe_between_epochs(self, trainer: Trainer) -> bool:
        """Whether `on_train_epoch_start` may save; with `max_steps` the trainer counts the end of an epoch as one of its steps."""
        return trainer.max_steps == -1

    def is_safe_between_steps(self, trainer: Trainer, batch_idx: int) -> bool:
        """Whether `on_train_batch_start` of this batch may save."""
        accumulating = batch_idx % trainer.accumulate_grad_batches != 0
        return batch_idx > 0 and not accumulating and not self._has_just_validated

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._between is not None

    def save(self, trainer: Trainer, between: SavePoint) -> None:
        """Save now; a collective call.

        Args:
            trainer: The trainer.
            between: "steps" or "epochs" if the trainer has already begun the next one, so that counters must be set back; or "end".
        """
        self._saved_step, self._saved_epoch = trainer.global_step, trainer.current_epoch
        if is_trial_run(trainer):
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.flush()
        self._between = between
        try:
            trainer.save_checkpoint(last_checkpoint(run_folder(trainer)), weights_only=False)
        finally:
            self._between = None

    # --- what --------------------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Correct the counters, and add what only the individual ranks know; a collective call."""
        loops = checkpoint["loops"]["fit_loop"]
        if self._between == "steps":
            set_back_step(loops)
        elif self._between == "epochs":
            set_back_epoch(loops)
        if self._between in ("epochs", "end"):
            checkpoint["epoch"] -= 1  # the last epoch that was trained, as in a checkpoint within an epoch
        checkpoint[KEY] = {
            **_identity(trainer),
            "global_batch": _global_batch(trainer),
            "ranks": gather_objects(_rank_state(trainer, pl_module)),
            "metrics_rows": next((log.rows for log in trainer.loggers if isinstance(log, MetricsCSV)), 0),
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Give this rank what it had gathered, and find the place in the epoch.

        Raises:
            UserError: The resumed run has another seed or other training images.
        """
        if trainer.state.fn != "fit":
            return
        added = checkpoint.get(KEY)
        if added is None:
            return
        for name, value in _identity(trainer).items():
            if added.get(name) != value:
                option = argument("seed_everything") if name == "seed" else f"{argument('data')} options"
                raise UserError(
                    f"the run being resumed has the {name} {added.get(name)}, not {value}: give the same {option}, or start a new run"
                )
        ranks = added["ranks"]
        if len(ranks) == trainer.world_size:
            _load_rank_states(trainer, pl_module, [ranks[trainer.global_rank]])
        elif trainer.global_rank == 0:
            _load_rank_states(trainer, pl_module, ranks)
        if added["global_batch"] != _global_batch(trainer):
            _rescale_batches_done(trainer, checkpoint["loops"]["fit_loop"], added["global_batch"])


def _identity(trainer: Trainer) -> dict[str, Any]:
    """Everything that determines which images a step takes, and what becomes of them; a resumed run must have the same."""
    data = data_module(trainer)
    images = {"images": getattr(data, "fingerprint", None), **getattr(data, "training_options", {})}
    return {"seed": os.environ.get("PL_GLOBAL_SEED"), **images}


def _rank_state(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    metrics = {
        name: metric.metric_state
        for name, metric in pl_module.named_modules()
        if isinstance(metric, Metric) and metric.update_called
    }
    state = {
        "metrics": metrics,
        "callbacks": {m.state_key: m.rank_state() for m in callbacks_of(trainer, NeuralCollapseMonitor)},
    }
    # other processes get it, and would put it on the device that it comes from
    on_cpu: dict[str, Any] = move_data_to_device(state, torch.device("cpu"))
    return on_cpu


def _load_rank_states(trainer: Trainer, pl_module: LightningModule, states: list[dict[str, Any]]) -> None:
    modules = dict(pl_module.named_modules())
    for state in states:
        for name, values in state["metrics"].items():
            metric = modules.get(name)
            if isinstance(metric, Metric) and values.keys() == metric.metric_state.keys():
                add_saved_state(metric, move_data_to_device(values, metric.device))
    for monitor in callbacks_of(trainer, NeuralCollapseMonitor):
        monitor.load_rank_states([s["callbacks"].get(monitor.state_key, {}) for s in states])


def _global_batch(trainer: Trainer) -> int:
    """The number of images of a batch over all processes; 0 if the data module has no batch size."""
    data = data_module(trainer)
    return int(getattr(data, "batch_size", 0)) * trainer.world_size


def _rescale_batches_done(trainer: Trainer, loops: dict[str, Any], saved_global_batch: int) -> None:
    """Recount the epoch's batches, each of which now holds another number of images.

    A few images may come twice, but none is left out.
    """
    done, now = batches_done(loops), _global_batch(trainer)
    if done == 0 or saved_global_batch == 0 or now == 0:
        return
    trainer.fit_loop.setup_data()  # it counts the batches of an epoch
    steps = trainer.accumulate_grad_batches
    # not beyond the last one: Lightning does not train at all when it resumes an epoch that is over
    moved = min(done * saved_global_batch // now, int(trainer.num_training_batches) - 1) // steps * steps
    set_batches_done(loops, moved)
    rank_zero_info(
        f"the checkpoint was saved after {done} batches of {saved_global_batch} images in its epoch: "
        f"training goes on after {moved} batches of {now}"
    )


class StepSeed(Callback):
    """Seeds torch, NumPy and Python from (seed, step, rank) before each training step.

    So dropout, stochastic depth and everything else that a step draws are repeated in a resumed run, and differ from rank to rank. The
    seed is that of `seed_everything`, or else torch's own at the start, which the checkpoint keeps.
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seed of `seed_everything`, or else torch's."""
        given = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything puts it
        if given is not None:
            self._seed = int(given)
        elif self._seed is None:
            self._seed = torch.initial_seed() % 2**32

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators for this step."""
        key = [self._seed or 0, trainer.fit_loop.total_batch_idx, trainer.global_rank]
        first, second, third, fourth = np.random.SeedSequence(key).generate_state(4).tolist()
        # not torch.manual_seed, which asks every kind of device that torch knows
        torch.default_generator.manual_seed(first << 32 | second)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(first << 32 | second)
        np.random.seed(third)
        random.seed(fourth)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed back."""
        self._seed = state_dict["seed"]
