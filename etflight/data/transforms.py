"""Whole-batch augmentation and normalisation, on whatever device the batch is on.

All randomness is drawn on the CPU from a seed of its own, so a step repeats exactly on every device and leaves the
process's random state alone.

Processor time of other ways to crop, mirror and normalise 128 images of 3×32×32, on one thread (torchvision 0.29,
Kornia 0.9), as a multiple of what is here:

| way | drawing included | without drawing |
|---|---|---|
| one flat `gather`, an index per pixel | | 1.4 |
| fancy indexing, an index per pixel and dimension | | more than 3.7 |
| Kornia, `cropping_mode="slice"` | 5.0 | |
| Kornia, `cropping_mode="resample"` | 6.5 | |
| torchvision v2, image by image | 17 | |

torchvision v2 would crop a whole batch at one place. Kornia draws a place for each image, but from the process's random
state and of float32 images, four times the memory to move; and it would be one more dependency.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etflight.errors import UserError


@contextmanager
def step_randomness(seed: int, step: int, rank: int) -> Iterator[None]:
    """Inside, the CPU generator is a function of (seed, step, rank); outside, it goes on as if nothing had happened."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds the CUDA generators too, and dropout draws from them.
        torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
        yield


def draw_crops(batch_size: int, padding: int, flip: bool) -> Tensor:
    """Draw from the CPU generator: `[3, B]` int64 rows top, left (each in 0 … 2·padding) and flipped (0 or 1)."""
    corners = torch.randint(0, 2 * padding + 1, (2, batch_size))
    flipped = torch.randint(0, 2, (1, batch_size)) if flip else torch.zeros(1, batch_size, dtype=torch.int64)
    return torch.cat([corners, flipped])


def crop_and_flip(images: Tensor, crops: Tensor, padding: int) -> Tensor:
    """Cut each image, zero-padded on all sides, at its own corner, and mirror those that are flipped.

    Args:
        images: `[B, C, H, W]`, any dtype; uint8 so that the padding is black.
        crops: `[3, B]` int64, on the CPU: top, left and flipped, as `draw_crops` gives them.
        padding: Pixels of zeros on each side.

    Returns:
        `[B, C, H, W]`, same dtype; a view that is not contiguous, until it is normalised.
    """
    batch, channels, height, width = images.shape
    mirrored = crops[2].nonzero().squeeze(1)  # while the crops are on the CPU: a GPU would be waited for
    slot = torch.where(crops[2] > 0, batch - 1 + crops[2].cumsum(0), torch.arange(batch))
    padded = torch.nn.functional.pad(images, [padding] * 4)
    padded = torch.cat([padded, padded.index_select(0, mirrored.to(images.device, non_blocking=True)).flip(3)])
    # Each crop, all its channels included, lies in one window of consecutive elements, with pixels of its neighbours
    # between the rows: one copy per image, twice as quick as an index per pixel.
    image, channel, row, column = padded.stride()
    left = torch.where(crops[2] > 0, 2 * padding - crops[1], crops[1])
    starts = slot * image + crops[0] * row + left * column
    size = (channels - 1) * channel + (height - 1) * row + (width - 1) * column + 1
    windows = padded.as_strided((padded.numel() - size + 1, size), (1, 1))
    chosen = windows.index_select(0, starts.to(images.device, non_blocking=True))
    return chosen.as_strided(images.shape, (size, channel, row, column))


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`(images/255 - mean)/std`, uint8 `[B, C, H, W]` to float32; `mean` and `std` hold 1 or C numbers."""
    scale, shift = _affine(mean, std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C, 1, 1]`, kept so that a step copies nothing from the host."""
    center, spread = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * spread)).to(device, torch.float32), (-center / spread).to(device, torch.float32)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flip, normalisation, then mixup or CutMix of a training batch.

    Crop and flip differ from image to image, λ is one per batch. With both `mixup` and `cutmix`, each batch gets one
    of them at even odds. Either turns labels `[B]` into probabilities `[B, K]`.

    Args:
        num_classes: K.
        mean: 1 or C numbers, of pixels in [0, 1].
        std: 1 or C positive numbers.
        crop_padding: Zeros padded on each side before the crop; 0: no crop.
        flip: Mirror half of the images.
        mixup: α of λ ~ Beta(α, α), Zhang et al., ICLR 2018; 0: off.
        cutmix: α of CutMix, Yun et al., ICCV 2019; 0: off.
        seed: At least 0.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def __call__(self, images: Tensor, labels: Tensor, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Transform uint8 `[B, C, H, W]` and int64 `[B]` to float32 and int64 `[B]` or float32 `[B, K]`.

        Raises:
            UserError: The padding is wider than the images.
        """
        if self.crop_padding > min(images.shape[-2:]):
            height, width = images.shape[-2:]
            raise UserError(
                f"crop_padding is {self.crop_padding}, but images are {height} × {width}: "
                "give at most the shorter side, or a crop may miss the image"
            )
        with step_randomness(self.seed, step, rank):
            if self.crop_padding or self.flip:
                crops = draw_crops(len(images), self.crop_padding, self.flip)
                images = crop_and_flip(images, crops, self.crop_padding)
            images = normalize(images, self.mean, self.std)
            return (images, labels) if self._mix is None else self._mix(images, labels)

    @cached_property
    def _mix(self) -> Any:
        if not (self.mixup or self.cutmix):
            return None
        # torchvision takes seconds, which `--help` need not wait for
        from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice  # type: ignore[attr-defined]

        mixers = [
            mixer(alpha=alpha, num_classes=self.num_classes)
            for mixer, alpha in ((MixUp, self.mixup), (CutMix, self.cutmix))
            if alpha > 0
        ]
        return mixers[0] if len(mixers) == 1 else RandomChoice(mixers)
