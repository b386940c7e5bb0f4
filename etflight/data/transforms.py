"""Brightness, contrast and saturation of a whole batch, each image by factors of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from etflight.utils.errors import UserError

_LUMA = (0.2989, 0.587, 0.114)  # of red, green and blue in grey, ITU-R BT.601, as torchvision rounds them


def draw_color_factors(batch_size: int, strength: float, seed: int, step: int, rank: int) -> NDArray[np.float32]:
    """`[3, B]` factors of brightness, contrast and saturation, each uniform in 1 ± `strength`."""
    random = np.random.default_rng([seed, step, rank, 1])  # 1: not the numbers of crops, which have no fourth
    return random.uniform(1 - strength, 1 + strength, (3, batch_size)).astype(np.float32)


def jitter_colors(images: Tensor, factors: NDArray[np.float32]) -> Tensor:
    """Change brightness, then contrast, then saturation, as `torchvision.transforms.ColorJitter` defines them.

    Each of the three is linear in the pixels, so all are one matrix per image; what leaves the range is clipped once, at
    the end, where torchvision clips after each.

    Args:
        images: `[B, C, H, W]`, uint8, C = 3 (RGB); with any other C saturation does nothing, and grey is the mean of the channels.
        factors: `[3, B]`, 0 or more, as `draw_color_factors` gives them.

    Returns:
        `[B, C, H, W]` float32 in [0, 255].
    """
    batch, channels = images.shape[:2]
    brightness, contrast, saturation = (
        torch.from_numpy(factors).to(images.device, non_blocking=True).view(3, batch, 1, 1)
    )
    luma, grey, identity = _grey(channels, images.device)
    pixels = images.reshape(batch, channels, -1).to(torch.float32)
    mean_grey = (luma @ pixels.mean(2, keepdim=True)).view(batch, 1, 1) * brightness
    matrix = brightness * contrast * torch.lerp(grey, identity, saturation)
    return torch.baddbmm((1 - contrast) * mean_grey, matrix, pixels).clamp_(0, 255).view(images.shape)


@lru_cache(maxsize=16)
def _grey(channels: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Weights `[C]` of grey, the matrix `[C, C]` that takes all colour away, and the one that leaves it; kept on the device."""
    identity = torch.eye(channels, device=device)
    if channels != 3:
        return torch.full((channels,), 1 / channels, device=device), identity, identity
    luma = torch.tensor(_LUMA, device=device)
    return luma, luma.expand(3, 3), identity


_STEPS_AT_ONCE = 64


@contextmanager
def step_randomness(seed: int, step: int, rank: int) -> Iterator[None]:
    """Inside, the CPU generator is a function of (seed, step, rank); outside, it goes on as if nothing had happened."""
    state = np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed: that seeds the CUDA generators too, and dropout draws from them.
        torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))
        yield


def draw_crops(batch_size: int, padding: int, flip: bool, seed: int, step: int, rank: int) -> NDArray[np.int64]:
    """`[3, B]` rows: top, left (each in 0 … 2·padding) and flipped (0 or 1)."""
    block, place = divmod(step, _STEPS_AT_ONCE)
    crops: NDArray[np.int64] = _crops_of_block(batch_size, padding, flip, seed, block, rank)[place]
    return crops


@lru_cache(maxsize=4)
def _crops_of_block(batch_size: int, padding: int, flip: bool, seed: int, block: int, rank: int) -> NDArray[np.int64]:
    """`[steps, 3, B]`: to seed a generator takes longer than to draw a batch's crops, so it is done once for many."""
    random = np.random.default_rng([seed, block, rank])
    crops = np.zeros((_STEPS_AT_ONCE, 3, batch_size), np.int64)
    crops[:, :2] = random.integers(0, 2 * padding + 1, (_STEPS_AT_ONCE, 2, batch_size))
    if flip:
        crops[:, 2] = random.integers(0, 2, (_STEPS_AT_ONCE, batch_size))
    return crops


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
    (top, left, flipped), device = crops, images.device
    mirrored = images.index_select(0, _sent(flipped.nonzero()[0], device)).flip(3)
    slot = np.where(flipped, batch - 1 + flipped.cumsum(), np.arange(batch))
    left = np.where(flipped, 2 * padding - left, left)
    # A crop is its image moved by a number of elements, in one piece: one copy per image, several times as quick as an
    # index per pixel. What wraps around a side, or comes from a neighbour, lies in the padding and is blackened.
    edge = images.new_zeros(padding * (width + 1))  # so `flat` begins at the first corner, (-padding, -padding)
    flat = torch.cat([edge, images.reshape(-1), mirrored.reshape(-1), edge])
    size = images[0].numel()
    cropped = _windows(flat, size, slot * size + top * width + left).view(images.shape)
    if padding:
        inside = _inside(height, width, padding, device)
        visible = _windows(inside, height * width, (left * (height + 2 * padding) + top) * width)
        cropped &= visible.view(batch, 1, height, width)
    return cropped


def _windows(flat: Tensor, size: int, starts: NDArray[np.int64]) -> Tensor:
    """`[B, size]`: that many consecutive elements of `flat` from each start."""
    windows = flat.as_strided((flat.numel() - size + 1, size), (1, 1))
    return windows.index_select(0, _sent(starts, flat.device))


def _sent(values: NDArray[np.int64], device: torch.device) -> Tensor:
    return torch.from_numpy(values).to(device, non_blocking=True)


@lru_cache(maxsize=16)
def _inside(height: int, width: int, padding: int, device: torch.device) -> Tensor:
    """Flat uint8 `[2·padding + 1, height + 2·padding, width]`: 255 in the image, 0 in the padding.

    The first dimension is a crop's left; its top is the row where it begins.
    """
    column = torch.arange(2 * padding + 1).view(-1, 1, 1) + torch.arange(width) - padding
    row = torch.arange(height + 2 * padding).view(-1, 1) - padding
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    return (inside.to(torch.uint8) * 255).flatten().to(device)


def normalize(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """`(images/255 - mean)/std`, `[B, C, H, W]` to float32; `mean` and `std` hold 1 or C numbers; float32 in place."""
    scale, shift = _affine(mean, std, images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@lru_cache(maxsize=16)
def _affine(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and shift `[C, 1, 1]`, kept so that a step copies nothing from the host."""
    center, spread = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std))
    return (1 / (255 * spread)).to(device, torch.float32), (-center / spread).to(device, torch.float32)


@dataclass(frozen=True, kw_only=True)
class TrainTransform:
    """Random crop, flip, colours, normalisation, then mixup or CutMix of a training batch.

    Crop, flip and colours differ from image to image, λ is one per batch. With both `mixup` and `cutmix`, each batch gets one
    of them at even odds. Either turns labels `[B]` into probabilities `[B, K]`.

    Args:
        num_classes: K.
        mean: 1 or C numbers, of pixels in [0, 1].
        std: 1 or C positive numbers.
        crop_padding: Zeros padded on each side before the crop; 0: no crop.
        flip: Mirror half of the images.
        color_jitter: Brightness, contrast and saturation change by factors within 1 ± this; 0: off.
        mixup: α of λ ~ Beta(α, α), Zhang et al., ICLR 2018; 0: off.
        cutmix: α of CutMix, Yun et al., ICCV 2019; 0: off.
        seed: At least 0.
    """

    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_padding: int = 0
    flip: bool = False
    color_jitter: float = 0.0
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
        if self.crop_padding or self.flip:
            crops = draw_crops(len(images), self.crop_padding, self.flip, self.seed, step, rank)
            images = crop_and_flip(images, crops, self.crop_padding)
        if self.color_jitter:
            images = jitter_colors(images, draw_color_factors(len(images), self.color_jitter, self.seed, step, rank))
        images = normalize(images, self.mean, self.std)
        if self._mix is not None:
            with step_randomness(self.seed, step, rank):
                images, labels = self._mix(images, labels)
        return images, labels

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
