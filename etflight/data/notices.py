"""What a training is told of its images before it starts."""

from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info

from etflight.utils.errors import argument, first_few, warn
from etflight.utils.trainer import choose_by_validation

if TYPE_CHECKING:
    from etflight.data.base import ImageDataModule


def tell_of_training_images(data: "ImageDataModule", trainer: Trainer | None, rank: int) -> None:
    """Say what is trained on, what validation takes from it, and what its test images cannot tell afterwards.

    Args:
        data: The data, whose training images have been read.
        trainer: The trainer, if there is one.
        rank: The rank of this process, of which only the first speaks.
    """
    rank_zero_info(
        f"{data}: {data.class_counts.sum()} training images, {data.num_classes} classes, "
        f"imbalance ratio {data.describe_ratio()}, subset {data.fingerprint}"
    )
    untested = data.untested()  # by each rank, because it refuses a class that no training image has
    if rank > 0:
        return
    if (cost := data.cost_of_validation) is not None:
        warn(f"{data}: {cost}")
    if untested:
        names = (data.class_names[label] for label in sorted(untested))
        warn(
            f"{data}: test has no image of {first_few(names, len(untested))}, {len(untested)} of {data.num_classes} classes: "
            "accuracies over classes are those of the others; add images, or leave the classes out of train"
        )
    choosing = [] if data.val_is_held_out or trainer is None else choose_by_validation(trainer)
    if choosing:
        warn(
            f"the validation images are the test set, but {' and '.join(choosing)} will choose by them, so that a test is no fair "
            f"one any more: hold images out ({argument('data.val_fraction', 0.1)})"
        )
