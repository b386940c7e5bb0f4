"""Whole batches on the device: random crop, flip, automatic augmentation, colours, normalisation, Cutout, mixup and CutMix."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.data.auto_augment import AutoAugment, augment
from etflight.data.erasing import draw_cutouts, draw_erasings, erase
from etflight.utils.errors import UserError


@contextmanager
def step_randomness(*key: int) -> Iterator[None]:
    """Within the block, the CPU generator depends only on the key, such as (seed, step, rank); afterwards it is as it was before."""
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds the CUDA generators too, and dropout draws from them.
        torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
        yield


def draw_crops(batch_size: int, padding: int, flip: bool, random: np.random.Generator) -> NDArray[np.int64]:
    """`[3, B]` rows: top, left (each in 0 … 2·padding) and flipped (0 or 1)."""
    corners = random.integers(0, 2 * padding + 1, (2, batch_size))
    return np.vstack([corners, random.integers(0, 1 + flip, (1, batch_size))])


def crop_and_flip(images: Tensor, crops: NDArray[np.int64], padding: int) -> Tensor:
    """Cut each image, zero-padded on all sides, at its own corner, and mirror those that are flipped.

    Args:
        images: `[B, C, H, W]`, uint8.
        crops: `[3, B]` top, left and flipped, as `draw_crops` gives them.
        padding: Pixels of zeros on each side.

    Returns:
        `[B, C, H, W]`, uint8, contiguous.
    """
    batch, _, height, width = images.shape
    top, left, flipped = torch.from_numpy(crops).to(images.device, non_blocking=True)
    padded = torch.nn.functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view [B, C, tops, lefts, H, W]
    cropped = windows[torch.arange(batch, device=images.device), :, top, left]
    return torch.where(flipped.bool().view(-1, 1, 1, 1), cropped.flip(3), cropped)


def jitter_colors(images: Tensor, factors: NDArray[np.float32]) -> Tensor:
    """Change brightness, then contrast, then saturation, as `torchvision.transforms.ColorJitter` defines them.

    Values outside the range are clipped once, at the end; torchvision clips after each change.

    Args:
        images: `[B, C, H, W]`, uint8, C = 3 (RGB); with any other C grey is the mean of the channels, and saturation does nothing.
        factors: `[3, B]`, 0 or more.

    Returns:
        `[B, C, H, W]` float32 in [0, 255].
    """
    brightness, contrast, saturation = (
        torch.from_numpy(factors).to(images.device, non_blocking=True).view(3, -1, 1, 1, 1)
    )
    pixels = images * brightness
    pixels = torch.lerp(_grey(pixels).mean((2, 3), keepdim=True), pixels, contrast)
    if images.shape[1] == 3:
        pixels = torch.lerp(_grey(pixels), pixels, saturation)
    return pixels.clamp_(0, 255)


def _grey(pixels: Tensor) -> Tensor:
    """`[B, C, H, W]` to `[B, 1, H, W]`, by the weights of ITU-R BT.601 as torchvision rounds them."""
    if pixels.shape[1] != 3:
        return pixels.mean(1, keepdim=True)
    red, green, blue = pixels.unbind(1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`(images/255 - mean)/std` as float32 `[B, C, H, W]`; `mean` and `std` hold 1 or C numbers; float32 images change in place."""
    scale, shift = _affine(mean, std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C, 1, 1]`, kept so that a step copies nothing from the host."""
    center, spread = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * spread)).to(device, torch.float32), (-center / spread).to(device, torch.float32)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flip, automatic augmentation, colours, normalisation, Cutout, then mixup or CutMix of a training batch.

    All but mixup and CutMix differ from image to image; a batch has one λ. With both `mixup` and `cutmix`, each batch gets one
    of them at even odds. Either turns labels `[B]` into probabilities `[B, K]`.

    Args:
        num_classes: K.
        mean: 1 or C numbers, of pixels in [0, 1].
        std: 1 or C positive numbers.
        crop_padding: Zeros padded on each side before the crop; 0: no crop.
        flip: Mirror half of the images.
        auto_augment: A policy that `AutoAugment.parse` knows; None: off.
        color_jitter: Brightness, contrast and saturation change by factors within 1 ± this; 0: off.
        cutout: Side in pixels of a square that becomes the mean; 0: off.
        random_erasing: Probability of a rectangle that becomes the mean.
        views: How often each image comes, one view of all images after the other; 1 with mixup or CutMix.
        mixup: α of λ ~ Beta(α, α), Zhang et al., ICLR 2018; 0: off.
        cutmix: α of CutMix, Yun et al., ICCV 2019; 0: off.
        seed: The seed, at least 0.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    auto_augment: str | None = None
    color_jitter: float = 0.0
    cutout: int = 0
    random_erasing: float = 0.0
    views: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    seed: int = 0

    def __call__(self, images: Tensor, labels: Tensor, step: int, rank: int = 0) -> tuple[Tensor, Tensor]:
        """Transform uint8 `[B, C, H, W]` and int64 `[B]` to float32 and int64 `[views·B]` or float32 `[B, K]`.

        Raises:
            UserError: The padding or the square is wider than the images, or they have no channels that can be augmented.
        """
        channels, height, width = images.shape[1:]
        if self.crop_padding > min(height, width):
            raise UserError(
                f"crop_padding is {self.crop_padding}, but images are {height} × {width}: "
                "give at most the shorter side, or a crop may miss the image"
            )
        if self.cutout > min(height, width):
            raise UserError(
                f"cutout is {self.cutout}, but images are {height} × {width}: give at most the shorter side"
            )
        if self._policy is not None and channels not in (1, 3):
            raise UserError(
                f"auto_augment changes grey and RGB images, but these have {channels} channels: leave it out"
            )
        random = np.random.default_rng([self.seed, step, rank])
        if self.views > 1:
            images, labels = images.repeat(self.views, 1, 1, 1), labels.repeat(self.views)
        if self.crop_padding or self.flip:
            crops = draw_crops(len(images), self.crop_padding, self.flip, random)
            images = crop_and_flip(images, crops, self.crop_padding)
        if self._policy is not None:
            images = augment(images, *self._policy.draw(len(images), height, width, random))
        if self.color_jitter:
            factors = random.uniform(1 - self.color_jitter, 1 + self.color_jitter, (3, len(images)))
            images = jitter_colors(images, factors.astype(np.float32))
        images = normalize(images, self.mean, self.std)
        if self.cutout:
            erase(images, draw_cutouts(len(images), self.cutout, height, width, random))
        if self.random_erasing:
            erase(images, draw_erasings(len(images), self.random_erasing, height, width, random))
        if self._mix is not None:
            with step_randomness(self.seed, step, rank):
                images, labels = self._mix(images, labels)
        return images, labels

    @cached_property
    def _policy(self) -> AutoAugment | None:
        return None if self.auto_augment is None else AutoAugment.parse(self.auto_augment)

    @cached_property
    def _mix(self) -> Any:
        if not (self.mixup or self.cutmix):
            return None
        # the import of torchvision takes seconds, which `--help` need not wait for
        from torchvision.transforms.v2 import CutMix, MixUp, RandomChoice  # type: ignore[attr-defined]

        kinds = [(MixUp, self.mixup), (CutMix, self.cutmix)]
        return RandomChoice([kind(alpha=alpha, num_classes=self.num_classes) for kind, alpha in kinds if alpha > 0])
