"""The epochs in which the training images are swept for neural collapse."""

import math
from typing import Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from etflight.data.base import ImageDataModule
from etflight.utils.errors import UserError, argument
from etflight.utils.trainer import callbacks_of, data_module, is_trial_run

_SMALL = 10**8  # up to this many pixels of training images, a sweep is worth its time in each epoch
# the most images of all sweeps over more pixels, as a part of the images that train; less than a tenth of the time, since on a frozen
# backbone an image takes 1.0 to 1.2 times as long to sweep as to train, and less where the backbone learns (0.25 to 0.3 times)
_SHARE = 1 / 12


class SweepRhythm:
    """The epochs in which a `NeuralCollapseMonitor` sweeps over the training images.

    Args:
        every_n_epochs: The monitor's option of this name.
        before_training: The monitor's option of this name.

    Raises:
        UserError: `every_n_epochs` is no number of epochs.
    """

    def __init__(self, every_n_epochs: int | Literal["auto"], before_training: bool) -> None:
        if every_n_epochs != "auto" and not (isinstance(every_n_epochs, int) and every_n_epochs >= 1):
            raise UserError(f'NeuralCollapseMonitor: every_n_epochs is {every_n_epochs!r}: give 1 or more, or "auto"')
        self._asked, self._before_training = every_n_epochs, before_training
        self.start()

    def start(self) -> None:
        """Begin another training."""
        self._every: int | None = 1 if self._asked == "auto" else self._asked
        self._is_rationed = False  # whether validations within an epoch go without a sweep

    @property
    def sweeps_at_the_end(self) -> bool:
        """Whether the final weights are measured."""
        return self._every is not None

    def decide(self, trainer: Trainer) -> bool:
        """Choose the epochs of a training that is about to take its first step, and return whether the model is measured before it."""
        if self._asked == "auto" and _is_large(trainer):
            return self._ration(trainer)
        return self._before_training

    def is_due(self, trainer: Trainer) -> bool:
        """Whether the training images are measured in this epoch."""
        epoch = trainer.current_epoch + 1
        if epoch == trainer.max_epochs and callbacks_of(trainer, StochasticWeightAveraging):
            return False  # its average becomes the model after the last epoch, and is measured then
        if self._is_rationed and not epochs_trained(trainer).is_integer():
            return False
        return (
            self._every is not None
            and trainer.state.fn == TrainerFn.FITTING
            and (epoch % self._every == 0 or epoch == trainer.max_epochs)
        )

    def _ration(self, trainer: Trainer) -> bool:
        """Choose the epochs so that all sweeps take little of the training.

        Images are counted, and no seconds, so that each repetition of a run measures the same epochs.
        """
        data, batches = data_module(trainer), int(trainer.num_training_batches)
        images = int(data.class_counts.sum())
        epochs = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches / batches
        if trainer.max_epochs not in (None, -1):
            epochs = min(epochs, trainer.max_epochs)
        an_epoch = _SHARE * min(1.0, data.batch_size * trainer.world_size * batches / images)  # sweeps that it pays for
        what = f"neural collapse of the {images:,} training images"
        always = argument("monitor.every_n_epochs", 1)
        sweeps = epochs * an_epoch + 1e-9  # twelve epochs pay for one
        if sweeps < 1:
            self._every = None
            rank_zero_info(
                f"{what} is not measured, since one sweep over them would add more than a tenth to this training: "
                f"{always} measures it nevertheless, etflight collapse afterwards"
            )
            return False
        self._is_rationed = True
        first = self._before_training and sweeps >= 2
        every: int = math.ceil(1 / an_epoch) if math.isinf(epochs) else math.ceil(epochs / (int(sweeps) - first))
        self._every = every
        when = ["before the training"] * first + [f"every {every} epochs"] * (every < epochs)
        rank_zero_info(
            f"{what} is measured {', '.join(when)}{' and ' if when else ''}at the end, so that it adds less than a tenth to the training; "
            f"that of the validation images is measured whenever they are validated: {always} measures both in each epoch"
        )
        return first


def epochs_trained(trainer: Trainer) -> float:
    """The number of epochs that have been trained, a fraction within an epoch."""
    done, batches = trainer.fit_loop.batch_idx + 1, trainer.num_training_batches
    return trainer.current_epoch + (1.0 if trainer.is_last_batch or done >= batches else done / batches)


def _is_large(trainer: Trainer) -> bool:
    """Whether a sweep in each epoch would take too long."""
    data = data_module(trainer)
    if not isinstance(data, ImageDataModule) or is_trial_run(trainer):
        return False  # nothing is known of what its images cost, or there is one epoch of one batch
    _, height, width = data.preprocessing.input_size
    return int(data.class_counts.sum()) * height * width > _SMALL
