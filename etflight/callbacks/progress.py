"""What somebody sees who watches a training: the step, the bar, a line for each epoch, the speed."""

import csv
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn

from etflight.classifier import Classifier
from etflight.losses import Loss
from etflight.runs.loggers import MetricsCSV, run_folder
from etflight.utils.trainer import data_module, is_trial_run, shows_after

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


class Speed(Callback):
    """Tells images per second, the share of time spent waiting for data, and peak memory.

    The progress bar has those of the epoch so far every `log_every_n_steps`. Each epoch leaves `speed/images_per_s`, `speed/data_wait`,
    `speed/peak_memory_gb` and `speed/epoch_s` in `<run folder>/speed.csv` and in every logger but `metrics.csv`, which is the same for
    every repetition of a run. Validation and what callbacks do with it count in `speed/epoch_s` only, the seconds that the whole epoch
    took. Images are those of all processes; waiting and memory are the first process's: that of its GPU, or else of the whole process
    without its loader's workers. Reads clocks only: nothing waits for the device, nothing is in checkpoints.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here, should this be within an epoch."""
        self._images, self._waited_before = 0, _waited(trainer)
        self._started_at = self._counts_from = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self.on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stopped_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if not trainer.sanity_checking:
            self._counts_from += time.perf_counter() - self._stopped_at

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and show the epoch's speed so far now and then."""
        self._images += len(batch[0]) * trainer.world_size
        if shows_after(trainer, batch_idx):
            self._measure(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._log(trainer, *self._measure(trainer))

    def _measure(self, trainer: Trainer) -> tuple[float, float]:
        """Images per second and the share of waiting in this epoch, which the progress bar shows from now on."""
        seconds = time.perf_counter() - self._counts_from
        speed, waiting = self._images / seconds, (_waited(trainer) - self._waited_before) / seconds
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
            "speed/epoch_s": time.perf_counter() - self._started_at,
        }
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, **values}
        path = run_folder(trainer) / "speed.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsCSV):
                logger.log_metrics({**values, "epoch": trainer.current_epoch}, step=trainer.global_step - 1)


def _waited(trainer: Trainer) -> float:
    """Seconds that the training loader has kept the process waiting, NaN for one that does not tell."""
    return float(getattr(trainer.train_dataloader, "waited", math.nan))


def peak_memory(device: torch.device) -> float:
    """The largest number of bytes that tensors have taken on a CUDA device so far, or else this process in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class StepNotice(Callback):
    """One line when training starts: global batch, learning rate, class balance; and a warning about BatchNorm on several GPUs."""

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
        if (
            trainer.world_size > 1
            and trainer.strategy.root_device.type == "cuda"
            and has_unsynced_batch_norm(pl_module)
        ):
            rank_zero_warn(
                "BatchNorm normalises each process's images by themselves: add --trainer.sync_batchnorm true for the "
                "statistics of the global batch"
            )


def describe_step(*, processes: int, batch_size: int, accumulated: int, lr: float | None, loss: Loss) -> str:
    """The line, for instance of two processes with 64 images each.

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
    if loss.class_balance == "batch":
        balance += f" (exponent {loss.exponent:g}): counts over all processes of a step"
        balance += ", not over accumulated micro-batches" if accumulated > 1 else ""
    elif loss.class_balance == "global":
        balance += f" (exponent {loss.exponent:g}): the training set's counts"
    elif loss.class_balance == "effective":
        balance += f" (exponent {loss.exponent:g}, beta {loss.beta:g}): the training set's counts"
    if loss.renormalize and loss.class_balance != "none":
        balance += ", weights divided by their mean over a step"
    return "; ".join([*parts, balance])


def has_unsynced_batch_norm(model: nn.Module) -> bool:
    """Whether a BatchNorm of the model knows its own process's images only."""
    return any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in model.modules())
