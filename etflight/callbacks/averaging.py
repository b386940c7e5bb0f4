"""The exponential moving average of the weights."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from etflight.utils.errors import UserError


class ExponentialMovingAverage(WeightAveraging):
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
                f"a moving average needs weights in float32: give --trainer.precision {trainer.precision.replace('true', 'mixed')}"
            )
        self._device = trainer.strategy.root_device
        self._latest_update_step, self._latest_update_epoch = 0, -1
        super().setup(trainer, pl_module, stage)
        assert self._average_model is not None
        trainer.precision_plugin.convert_module(self._average_model.module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the average, which the model has taken over: what is validated next may be another model."""
        self._average_model = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Forget the average; Lightning does not call `teardown` then."""
        self.teardown(trainer, pl_module, "fit")

    def _average(self, averages: list[Tensor], current: list[Tensor], number: Tensor) -> None:
        if averages[0].is_floating_point():
            self._average_floats(averages, current, number)
        else:
            for average, now in zip(averages, current, strict=True):
                average.copy_(now)
