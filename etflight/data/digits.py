"""scikit-learn's embedded digits: a real image set of 1,797 images that needs no file."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from etflight.data.base import ImageDataModule, Split
from etflight.data.profiles import long_tailed_subset
from etflight.data.sources import ArraySource

TEST_IMAGES_PER_CLASS = 50


@dataclass(eq=False)
class Digits(ImageDataModule):
    """Hand-written digits, 8×8, grey, 10 classes (Alpaydin and Kaynak, UCI 1998), as scikit-learn carries them.

    The 500 test images, 50 per class, are the same for every seed; the other 1,297 train.
    """

    # Of all 1,797 images.
    standard_mean: ClassVar[tuple[float, ...]] = (0.3053,)
    standard_std: ClassVar[tuple[float, ...]] = (0.3760,)

    @property
    def num_classes(self) -> int:
        """10."""
        return 10

    @property
    def num_channels(self) -> int:
        """1."""
        return 1

    @property
    def class_names(self) -> list[str]:
        """`"0"` … `"9"`."""
        return [str(digit) for digit in range(10)]

    def load(self, split: Split) -> ArraySource:
        """The digits, 0 … 16 scaled to 0 … 255."""
        from sklearn.datasets import load_digits  # takes a second to import

        digits = load_digits()
        test = np.sort(long_tailed_subset(digits.target, [TEST_IMAGES_PER_CLASS] * 10))
        chosen = test if split == "test" else np.setdiff1d(np.arange(len(digits.target)), test)
        pixels = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return ArraySource(torch.from_numpy(pixels).unsqueeze(1), torch.from_numpy(digits.target[chosen]))
