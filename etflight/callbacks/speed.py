"""How fast a training is, and what it waits for."""

import csv
import math
import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from etflight.callbacks.trainer import is_trial_run, run_folder, shows_after
from etflight.metrics_csv import MetricsCSV


class Speed(Callback):
    """Tells images per second, the share of time spent waiting for data, and peak memory.

    In the progress bar every `log_every_n_steps`; of each epoch as `speed/images_per_s`, `speed/data_wait`, `speed/peak_memory_gb` and
    `speed/epoch_s` in `<run folder>/speed.csv` and every logger but `metrics.csv`, which is the same for every repetition of a run.
    Validation and what callbacks do with it count in `speed/epoch_s` only, the seconds that the whole epoch took. Images are those of all
    processes; waiting and memory are the first process's: that of its GPU, or else of the whole process without its loader's workers.
    Reads clocks only: nothing waits for the device, nothing is in checkpoints.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here, should this be within an epoch."""
        self._epoch, self._recent = _Count(_waited(trainer)), _Count(_waited(trainer))
        self._started_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self.on_train_start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stopped_at = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the clock go on."""
        if not trainer.sanity_checking:
            pause = time.perf_counter() - self._stopped_at
            self._epoch.start += pause
            self._recent.start += pause

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and show the speed now and then."""
        images = len(batch[0]) * trainer.world_size
        self._epoch.images += images
        self._recent.images += images
        if shows_after(trainer, batch_idx):
            self._show(trainer, self._recent)
            self._recent = _Count(_waited(trainer))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the epoch."""
        self._show(trainer, self._epoch)
        self._log(trainer)

    def _show(self, trainer: Trainer, count: "_Count") -> None:
        shown: Any = {"images/s": f"{count.images_per_second:.0f}", "waiting": f"{count.share(_waited(trainer)):.0%}"}
        trainer.progress_bar_metrics.update(shown)

    @rank_zero_only
    def _log(self, trainer: Trainer) -> None:
        if is_trial_run(trainer):
            return
        values = {
            "speed/images_per_s": self._epoch.images_per_second,
            "speed/data_wait": self._epoch.share(_waited(trainer)),
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


@dataclass
class _Count:
    waited_before: float
    images: int = 0
    start: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    def share(self, waited: float) -> float:
        return (waited - self.waited_before) / self.seconds


def _waited(trainer: Trainer) -> float:
    """Seconds that the training loader has kept the process waiting, NaN for one that does not tell."""
    return float(getattr(trainer.train_dataloader, "waited", math.nan))


def peak_memory(device: torch.device) -> float:
    """The largest number of bytes that tensors have taken on a CUDA device so far, or else this process in host memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
