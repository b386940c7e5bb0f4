"""What somebody sees who watches a training: the bar's numbers, and a line for each epoch."""

import math
import os
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from etflight.callbacks.trainer import shows_after

_ALIGNMENT = ("nc/train/alignment", "nc/train_online/alignment", "nc/val/alignment")


class Progress(Callback):
    """Prints a line for each epoch, and adds alignment and the time left to the progress bar.

    A line is such as `epoch 3/20: loss 0.412, val accuracy 87.3 %, alignment 0.913, 812 images/s, 0:04:10 left`, of what was measured. The
    time left is that of the whole training, validation and measurements included, at the pace since it was started or resumed.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._epoch: int | None = None
        self._started_at, self._started_with = time.perf_counter(), trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the epoch that is over by now, its last numbers logged."""
        self._tell(trainer)
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Estimate the time left now and then."""
        if shows_after(trainer, batch_idx):
            self._show(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the last epoch."""
        self._tell(trainer)

    def _show(self, trainer: Trainer) -> None:
        shown: dict[str, Any] = {}
        alignment = _first(trainer.callback_metrics, *_ALIGNMENT)
        if alignment is not None:
            shown["alignment"] = f"{alignment:.3f}"
        left = self._left(trainer)
        if left is not None:
            shown["left"] = left
        trainer.progress_bar_metrics.update(shown)

    def _tell(self, trainer: Trainer) -> None:
        if self._epoch is None:
            return
        self._show(trainer)
        if trainer.is_global_zero:
            speed = trainer.progress_bar_metrics.get("images/s")
            print(describe_epoch(self._epoch, trainer.max_epochs, trainer.callback_metrics, speed, self._left(trainer)))
            sys.stdout.flush()

    def _left(self, trainer: Trainer) -> str | None:
        done, total = trainer.global_step - self._started_with, trainer.estimated_stepping_batches
        if done <= 0 or math.isinf(total):
            return None
        seconds = (time.perf_counter() - self._started_at) * max(0.0, total - trainer.global_step) / done
        return str(timedelta(seconds=round(seconds)))


def describe_epoch(epoch: int, epochs: int | None, metrics: Mapping[str, Any], speed: object, left: str | None) -> str:
    """The line of one epoch.

    Args:
        epoch: its index, from 0.
        epochs: how many there will be; -1 or None: nobody knows.
        metrics: log names to values; those that are missing or NaN are left out.
        speed: images per second as text, or None.
        left: time left as text, or None.

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
    """Whether a progress bar would be seen: the output is a terminal, and neither CI nor a batch system runs this."""
    in_ci = os.environ.get("CI", "").lower() in ("true", "1")
    return sys.stdout.isatty() and not in_ci and "SLURM_JOB_ID" not in os.environ


def _first(metrics: Mapping[str, Any], *names: str) -> float | None:
    values = (float(metrics[name]) for name in names if name in metrics)
    return next((value for value in values if not math.isnan(value)), None)
