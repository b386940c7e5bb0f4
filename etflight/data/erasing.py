"""Cutout and random erasing of a whole batch: one rectangle of each image, at a place of its own, is emptied."""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TRIES = 10  # as in torchvision's RandomErasing
_AREA, _LOG_ASPECT = (0.02, 0.33), (math.log(0.3), math.log(3.3))


def draw_cutouts(batch_size: int, side: int, height: int, width: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Draw squares with their centre at any pixel, which may reach over the border (DeVries and Taylor, arXiv 1708.04552).

    Returns:
        `[4, B]`: top, bottom, left and right; bottom and right are the first outside.
    """
    top = random.integers(height, size=batch_size) - side // 2
    left = random.integers(width, size=batch_size) - side // 2
    return np.stack([top, top + side, left, left + side])


def draw_erasings(
    batch_size: int, probability: float, height: int, width: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """Draw the rectangles of random erasing (Zhong et al., AAAI 2020), with the areas and aspects of torchvision's `RandomErasing`.

    Returns:
        `[4, B]`, as `draw_cutouts`; an image that is left whole has an empty one.
    """
    area = height * width * random.uniform(*_AREA, (_TRIES, batch_size))
    aspect = np.exp(random.uniform(*_LOG_ASPECT, (_TRIES, batch_size)))
    sides = np.rint(np.sqrt([area * aspect, area / aspect])).astype(np.int64)
    fits = (sides[0] < height) & (sides[1] < width)
    first = fits.argmax(0)  # of the tries that fit
    erased = fits.any(0) & (random.random(batch_size) < probability)
    high, wide = np.where(erased, sides[:, first, np.arange(batch_size)], 0)
    top, left = random.integers(height - high + 1), random.integers(width - wide + 1)
    return np.stack([top, top + high, left, left + wide])


def erase(images: Tensor, rectangles: NDArray[np.int64]) -> Tensor:
    """Set a rectangle of each image to 0, in place: of normalised images, their mean.

    Args:
        images: `[B, C, H, W]`.
        rectangles: `[4, B]`, as `draw_cutouts` gives them.
    """
    top, bottom, left, right = torch.from_numpy(rectangles).to(images.device, non_blocking=True).view(4, -1, 1, 1, 1)
    y, x = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    y = y.view(-1, 1)
    return images.masked_fill_((y >= top) & (y < bottom) & (x >= left) & (x < right), 0.0)
