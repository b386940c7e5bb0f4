"""Averages of the weights: the exponential moving one, and the mean over the last epochs."""

from itertools import islice
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_ema_multi_avg_fn

from etflight.analysis.sweep import to_device
from etflight.callbacks.progress import Speed
from etflight.utils.errors import UserError, argument, warn
from etflight.utils.trainer import GivesBack, callbacks_of, is_trial_run, take_buffers_of_rank_zero


class ExponentialMovingAverage(GivesBack, WeightAveraging):
    """Validates, tests and saves the exponential moving average of the weights, as `EMAWeightAveraging` of Lightning does.

    Unlike there, BatchNorm's running statistics are averaged as the weights are, so they fit each other while the learning rate is high;
    what stays the same is not moved by rounding, such as fixed class vectors; whole numbers, such as the images of a class, are copied;
    and the average is on the device that trains.

    Args:
        decay: How much of the average a step keeps, from 0 to less than 1; 0.999 averages about 1,000 steps.

    Raises:
        UserError: The decay is out of its range, or the weights have half precision.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(
                f"decay of the moving average is {decay}: give a number from 0 to less than 1, such as 0.999"
            )
        super().__init__(use_buffers=True, multi_avg_fn=self._average)
        self._average_floats = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]  # leaves equal numbers as they are

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make a new average for each training, on the device that trains, where the model is not yet.

        Raises:
            UserError: The weights have half precision, in which an average does not move by small steps.
        """
        if stage != "fit":
            return
        if trainer.precision in ("bf16-true", "16-true"):
            raise UserError(
                "a moving average needs weights in float32: give "
                + argument("trainer.precision", trainer.precision.replace("true", "mixed"))
            )
        self._device = trainer.strategy.root_device
        self._latest_update_step, self._latest_update_epoch = 0, -1
        super().setup(trainer, pl_module, stage)
        assert self._average_model is not None
        trainer.precision_plugin.convert_module(self._average_model.module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average, which the model has taken over: what is validated next may be another model."""
        self._average_model = None

    def _average(self, averages: list[Tensor], current: list[Tensor], number: Tensor) -> None:
        if averages[0].is_floating_point():
            self._average_floats(averages, current, number)
        else:
            for average, now in zip(averages, current, strict=True):
                average.copy_(now)


class StochasticWeightAverage(StochasticWeightAveraging):
    """Trains on at a rate of its own, and ends with the mean of the weights at the ends of its epochs (SWA).

    After the last step the mean becomes the model, and one pass over the training batches of that epoch, augmented anew, gives BatchNorm
    its running statistics; frozen layers keep theirs. Only then comes the last validation. So what is measured, fitted and saved belongs to
    the mean, and no epoch is added, as `StochasticWeightAveraging` of Lightning adds one, which averages the weights at the *starts* of
    its epochs. A training that something else ends early, such as `EarlyStopping`, keeps the weights of its last step; a warning says so.

    Args:
        swa_lrs: The learning rate of its epochs, or one for each parameter group.
        swa_epoch_start: The first of its epochs, counted from 1; a number below 1 is a part of `max_epochs`: 0.8 is epoch 160 of 200.
        annealing_epochs: How many epochs the learning rate takes from the schedule's to `swa_lrs`; the first one has the schedule's.
        annealing_strategy: "cos" or "linear".

    Source:
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better Generalization", UAI 2018, arXiv 1803.05407.
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
    ) -> None:
        super().__init__(swa_lrs, swa_epoch_start, annealing_epochs, annealing_strategy)
        self._is_over = False

    @classmethod
    def of(cls, callback: StochasticWeightAveraging) -> "StochasticWeightAverage":
        """One with the options of Lightning's own, or itself if it is one."""
        if isinstance(callback, cls):
            return callback
        own = cls(0.1)
        vars(own).update(vars(callback))
        return own

    @staticmethod
    def pl_module_contains_batch_norm(pl_module: LightningModule) -> bool:
        """No, so that Lightning adds no epoch for its statistics."""
        return False

    @property
    def state_key(self) -> str:
        """That of Lightning's own, whose states it can go on from."""
        return StochasticWeightAveraging.__qualname__

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make a new average for each training."""
        if stage != "fit":
            return
        self._is_over = self._initialized = False
        self.n_averaged, self._init_n_averaged, self._scheduler_state = None, 0, None
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the first of its epochs.

        Raises:
            UserError: The training does not reach it.
        """
        super().on_fit_start(trainer, pl_module)
        if self.swa_start > self.swa_end and not is_trial_run(trainer):
            raise UserError(
                f"swa_epoch_start {self._swa_epoch_start} is never reached in {trainer.max_epochs} epochs, counted from 1: give an earlier "
                f"one, or more {argument('trainer.max_epochs')}"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on within an epoch that is resumed; Lightning does not announce its start."""
        if trainer.fit_loop.restarted_mid_epoch:
            self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the schedule in the first of its epochs."""
        self._latest_update_epoch = trainer.current_epoch  # else Lightning would average the weights as they are now
        super().on_train_epoch_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average the weights after the last step of an epoch, and put the mean into the model after the last of all."""
        if self.n_averaged is None:
            return
        assert self._average_model is not None
        if trainer.is_last_batch:
            self.update_parameters(self._average_model, pl_module, self.n_averaged, self._avg_fn)
        if _is_last_step(trainer) and self.n_averaged > 0:
            self._is_over = True
            self.transfer_weights(self._average_model, pl_module)
            renew_statistics(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if the mean has not become the model."""
        if not self._is_over and trainer.current_epoch != trainer.max_epochs and trainer.is_global_zero:
            warn("the training ended early, so its weights are those of the last step, not an average (SWA)")


def _is_last_step(trainer: Trainer) -> bool:
    """Whether the training is over after this batch, as far as its options say."""
    ends_epochs = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
    return ends_epochs or 0 <= trainer.max_steps <= trainer.global_step


def renew_statistics(trainer: Trainer, pl_module: LightningModule) -> None:
    """Compute BatchNorm's running statistics anew, as the mean over the batches of an epoch; those of frozen layers stay.

    Args:
        trainer: The trainer, after a step.
        pl_module: Its module, in the modes of that step.
    """
    layers = [
        module
        for module in pl_module.modules()
        if isinstance(module, _BatchNorm) and module.training and module.track_running_stats
    ]
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # which makes it a mean
    counted = trainer.fit_loop.epoch_loop.batch_progress.total
    before = counted.ready
    clocks = callbacks_of(trainer, Speed)
    for clock in clocks:
        clock.stop(trainer)
    try:
        with torch.no_grad():
            for batch in islice(cast(Any, trainer.train_dataloader), int(trainer.num_training_batches)):
                images = to_device(trainer, pl_module, batch)[0]
                with trainer.precision_plugin.forward_context():
                    pl_module(images)
                counted.ready += 1  # each batch is augmented as a step of its own
    finally:
        counted.ready = before
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    for clock in clocks:
        clock.restart(trainer)
    take_buffers_of_rank_zero(pl_module)
