"""Brightness, contrast and saturation of a whole batch, each image by factors of its own."""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
