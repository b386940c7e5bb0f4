"""What a person watching a training sees: a notice at the start, the progress bar, a line for each epoch, the speed."""

import csv
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from etflight.classifier import Classifier
from etflight.losses import Loss
from etflight.runs.folder import SPEED, run_folder
from etflight.runs.loggers import MetricsCSV
from etflight.utils.files import write_csv
from etflight.utils.trainer import data_module, is_trial_run, shows_after

_ALIGNMENT = ("nc/train/alignment", "nc/train_online/alignment", "nc/val/alignment")


class Progress(Callback):
    """Prints a line for each epoch, and adds alignment and the time left to the progress bar.

    A line looks like `epoch 3/20: loss 0.412, val accuracy 87.3 %, alignment 0.913, 812 images/s, 0:04:10 left`; values that were not
    measured are left out. The time left is that of the whole training, validation and measurements included, at the pace since the start
    or the resumption.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        # a run that goes on within an epoch does not begin it again
        self._epoch: int | None = trainer.current_epoch if trainer.fit_loop.restarted_mid_epoch else None
        self._started_at, self._started_with = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the epoch that has just ended; its last numbers have been logged by now."""
        self._tell(trainer)
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show alignment and the time left whenever the progress bar gets new numbers."""
        if shows_after(trainer, batch_idx):
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line of the last epoch."""
        self._tell(trainer)

    def _show(self, trainer: Trainer) -> None:
        shown: Any = trainer.progress_bar_metrics
        if (alignment := _first(trainer.callback_metrics, *_ALIGNMENT)) is not None:
            shown["alignment"] = f"{alignment:.3f}"
        if (left := self._left(trainer)) is not None:
            shown["left"] = left

    def _tell(self, trainer: Trainer) -> None:
        if self._epoch is None:
            return
        self._show(trainer)
        if trainer.is_global_zero:
            speed = trainer.progress_bar_metrics.get("images/s")
            line = describe_epoch(self._epoch, trainer.max_epochs, trainer.callback_metrics, speed, self._left(trainer))
            print(line, flush=True)

    def _left(self, trainer: Trainer) -> str | None:
        done, total = trainer.global_step - self._started_with, trainer.estimated_stepping_batches
        if done <= 0 or math.isinf(total):
            return None
        seconds = (time.perf_counter() - self._started_at) * max(0.0, total - trainer.global_step) / done
        return str(timedelta(seconds=round(seconds)))


def describe_epoch(epoch: int, epochs: int | None, metrics: Mapping[str, Any], speed: object, left: str | None) -> str:
    """Write the line of one epoch.

    Args:
        epoch: The index of the epoch, from 0.
        epochs: The number of epochs in all; -1 or None if unknown.
        metrics: The values by log name; those that are missing or NaN are left out.
        speed: The images per second as text, or None.
        left: The time left as text, or None.

    Example:
        >>> describe_epoch(2, 20, {"train/loss": 0.4123, "val/acc": 0.873, "val/acc_few": float("nan")}, "812", "0:04:10")
        'epoch 3/20: loss 0.412, val accuracy 87.3 %, 812 images/s, 0:04:10 left'
    """
    parts = []
    for name, keys, text in (
        ("loss", ("train/loss",), "{:.3g}"),
        ("val accuracy", ("val/acc",), "{:.1%}"),
        ("alignment", _ALIGNMENT, "{:.3f}"),
    ):
        value = _first(metrics, *keys)
        if value is not None:
            parts.append(f"{name} {text.format(value).replace('%', ' %')}")
    parts += [f"{speed} images/s"] if speed else []
    parts += [f"{left} left"] if left else []
    of = f"/{epochs}" if epochs is not None and epochs > 0 else ""
    return f"epoch {epoch + 1}{of}: {', '.join(parts)}"


def is_watched() -> bool:
    """Whether anybody would see a progress bar: the output is a terminal, and this runs neither in CI nor in a batch system."""
    in_ci = os.environ.get("CI", "").lower() in ("true", "1")
    return sys.stdout.isatty() and not in_ci and "SLURM_JOB_ID" not in os.environ


def _first(metrics: Mapping[str, Any], *names: str) -> float | None:
    values = (float(metrics[name]) for name in names if name in metrics)
    return next((value for value in values if not math.isnan(value)), None)


class Speed(Callback):
    """Reports images per second, the share of time spent waiting for data, and peak memory.

    The progress bar shows speed and waiting in the epoch so far every `log_every_n_steps`. Each epoch leaves `speed/images_per_s`,
    `speed/data_wait`, `speed/peak_memory_gb` and `speed/epoch_s` in `<run folder>/speed.csv` and in every logger except `metrics.csv`,
    which is the same for every repetition of a run. `speed/epoch_s` is the seconds from the end of one epoch to
    that of the next; only it includes validation and what other callbacks do, if they come before this one, and an epoch within which the
    run was resumed has none. The images are counted over all processes. Waiting time and memory are those of the first process: the
    memory of its GPU if it has one, or else host memory without the
    loader's workers. The callback only reads clocks: it never waits for the device and keeps nothing in checkpoints.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting, perhaps within an epoch of a resumed run; take rows of epochs to come out of the file."""
        self._began_at = time.perf_counter()
        self._is_whole = not trainer.fit_loop.restarted_mid_epoch
        if trainer.is_global_zero and not is_trial_run(trainer):
            _forget(run_folder(trainer) / SPEED, trainer.current_epoch)
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting the images of the epoch."""
        self._images, self._waited_before, self._counts_from = 0, _waited(trainer), time.perf_counter()
        self._seconds = math.nan

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.restart(trainer)

    def stop(self, trainer: Trainer) -> None:
        """Stop the clock, within an epoch, for what is no training step."""
        self._stopped_at, self._waited_until = time.perf_counter(), _waited(trainer)

    def restart(self, trainer: Trainer) -> None:
        """Let a clock that was stopped go on."""
        self._counts_from += time.perf_counter() - self._stopped_at
        self._waited_before += _waited(trainer) - self._waited_until

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and show the speed whenever the progress bar gets new numbers."""
        views = getattr(data_module(trainer), "views", 1)
        self._images += len(batch[0]) // views * trainer.world_size
        self._seconds = time.perf_counter() - self._counts_from
        if shows_after(trainer, batch_idx):
            self._measure(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._log(trainer, *self._measure(trainer))
        self._began_at, self._is_whole = time.perf_counter(), True

    def _measure(self, trainer: Trainer) -> tuple[float, float]:
        """Return images per second and the share of waiting in this epoch so far, and show both in the progress bar."""
        speed, waiting = self._images / self._seconds, (_waited(trainer) - self._waited_before) / self._seconds
        shown: Any = {"images/s": f"{speed:.0f}", "waiting": f"{waiting:.0%}"}
        trainer.progress_bar_metrics.update(shown)
        return speed, waiting

    @rank_zero_only
    def _log(self, trainer: Trainer, speed: float, waiting: float) -> None:
        if is_trial_run(trainer):
            return
        values = {
            "speed/images_per_s": speed,
            "speed/data_wait": waiting,
            "speed/peak_memory_gb": peak_memory(trainer.strategy.root_device) / 1e9,
        }
        if self._is_whole:
            values["speed/epoch_s"] = time.perf_counter() - self._began_at
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "speed/epoch_s": "", **values}
        path = run_folder(trainer) / SPEED
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsCSV):
                logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)


def _forget(path: Path, epoch: int) -> None:
    """Leave only the whole rows of earlier epochs in a `speed.csv`: a training that starts again, or goes on, writes the others anew."""
    if not path.is_file():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    if header[:3] != ["epoch", "step", "speed/epoch_s"]:
        return  # without a run folder, it may be somebody else's
    kept = [row for row in rows if len(row) == len(header) and row[0].isdigit() and int(row[0]) < epoch]
    if kept:
        write_csv(path, header, kept)
    else:
        path.unlink()


def _waited(trainer: Trainer) -> float:
    """The seconds that the training loader has kept the process waiting; NaN if the loader does not measure them."""
    return float(getattr(trainer.train_dataloader, "waited", math.nan))


def peak_memory(device: torch.device) -> float:
    """The largest number of bytes so far: of the tensors on a CUDA device, or else of this process in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class StepNotice(Callback):
    """Prints global batch, learning rate and class balance when training starts."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the line on the first process; optimizers exist by now."""
        data = data_module(trainer)
        rank_zero_info(
            describe_step(
                processes=trainer.world_size,
                batch_size=data.batch_size,
                accumulated=trainer.accumulate_grad_batches,
                lr=trainer.optimizers[0].defaults.get("lr"),
                loss=cast(Classifier, pl_module).loss,
            )
        )


def describe_step(*, processes: int, batch_size: int, accumulated: int, lr: float | None, loss: Loss) -> str:
    """Describe an optimizer step in one line: its global batch, learning rate and class balance.

    Example:
        >>> from etflight import CrossEntropyLoss
        >>> describe_step(processes=2, batch_size=64, accumulated=1, lr=0.1, loss=CrossEntropyLoss())
        "global batch 128 = 2 processes x 64 images; learning rate 0.1 as given (not scaled with the batch); class balance 'none'"
    """
    size = f"{processes} process{'es' if processes > 1 else ''} x {batch_size} images"
    if accumulated > 1:
        size += f" x {accumulated} accumulated"
    parts = [f"global batch {processes * batch_size * accumulated} = {size}"]
    if lr is not None:
        parts.append(f"learning rate {lr:g} as given (not scaled with the batch)")
    balance = f"class balance {loss.class_balance!r}"
    if loss.class_balance != "none":
        over = "the training set" if loss.class_balance != "batch" else "all processes of a step"
        balance += f" (exponent {loss.exponent:g}): counts over {over}"
    if loss.class_balance == "batch" and accumulated > 1:
        balance += ", not over accumulated micro-batches"
    return "; ".join([*parts, balance])
