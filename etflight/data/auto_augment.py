"""AutoAugment, RandAugment and TrivialAugment of a whole batch on its device, each image by draws of its own."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from etflight.utils.errors import UserError
from etflight.utils.precision import has_float64

OPERATIONS = (
    "Identity", "ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate", "Brightness", "Color", "Contrast", "Sharpness",
    "Posterize", "Solarize", "AutoContrast", "Equalize", "Invert",
)  # fmt: skip
_SHEAR_X, _SHEAR_Y, _TRANSLATE_X, _TRANSLATE_Y, _ROTATE, _BRIGHTNESS, _COLOR, _CONTRAST = range(1, 9)
Codes = NDArray[np.int64]
Magnitudes = NDArray[np.float64]
_SIGNED = range(1, 10)  # their magnitude is negated at even odds
_DRAWN = 14  # RandAugment and TrivialAugment draw among all operations but Invert
_POLICIES = ("autoaugment_cifar10", "autoaugment_imagenet", "randaugment", "trivialaugment")
_RANDAUGMENT = re.compile(r"randaugment(?:-n(\d+))?(?:-m(\d+))?")
_LEVELS = {"autoaugment": 10, "randaugment": 31, "trivialaugment": 31}


@dataclass(frozen=True)
class AutoAugment:
    """What is drawn for the images of a batch.

    Args:
        family: `autoaugment`, `randaugment` or `trivialaugment`.
        learned: Of AutoAugment, on which data its sub-policies were found: `cifar10` or `imagenet`.
        num_ops: Of RandAugment, operations on each image.
        level: Of RandAugment, the level of all magnitudes, 0 … 30.
    """

    family: str
    learned: str = ""
    num_ops: int = 2
    level: int = 9

    @classmethod
    def parse(cls, name: str) -> "AutoAugment":
        """Read the name of a policy: `autoaugment_cifar10`, `autoaugment_imagenet`, `randaugment` or `trivialaugment`.

        RandAugment's parameters follow its name: `randaugment-n2-m9` is torchvision's `RandAugment(2, 9)`, two operations on every image at
        level 9 of 30. timm counts to 10 and does each operation at even odds, so its `rand-m9` turns and shears as far as level 27 here.

        Raises:
            UserError: There is no such policy, or a parameter is out of its range.
        """
        match = _RANDAUGMENT.fullmatch(name)
        if match is None and name not in _POLICIES:
            raise UserError(f"auto_augment {name!r} is unknown: give {', '.join(_POLICIES)}, or randaugment-n2-m9")
        if match is None:
            family, _, learned = name.partition("_")
            return cls(family, learned, num_ops=2 if learned else 1)
        num_ops, level = (int(group or default) for group, default in zip(match.groups(), (2, 9), strict=True))
        if num_ops < 1 or level >= _LEVELS["randaugment"]:
            raise UserError(f"auto_augment {name!r}: give 1 operation (n) or more, and a level (m) from 0 to 30")
        return cls("randaugment", num_ops=num_ops, level=level)

    def draw(
        self, batch_size: int, height: int, width: int, random: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Draw the operations of each image, which are done one after another.

        Returns:
            Positions in `OPERATIONS` and magnitudes with their sign, both `[num_ops, B]`.
        """
        shape = (self.num_ops, batch_size)
        if self.learned:
            table = _sub_policies(self.learned)
            drawn = table[:, random.integers(table.shape[1], size=batch_size)].transpose(0, 2, 1)  # [3, 2, B]
            codes = np.where(random.random(shape) <= drawn[2], drawn[0], 0).astype(np.int64)
            levels = drawn[1].astype(np.int64)
        else:
            codes = random.integers(_DRAWN, size=shape)
            random_levels = self.family == "trivialaugment"
            levels = random.integers(_LEVELS[self.family], size=shape) if random_levels else np.full(shape, self.level)
        magnitudes = _magnitudes(self.family, height, width)[codes, levels]
        negative = np.isin(codes, _SIGNED) & (random.random(shape) <= 0.5)
        return codes, np.where(negative, -magnitudes, magnitudes)


@lru_cache(maxsize=2)
def _sub_policies(learned: str) -> NDArray[np.float64]:
    """`[3, 25, 2]`: operation, level and probability of the two steps of each published sub-policy."""
    # torchvision takes seconds, which `--help` need not wait for
    from torchvision.transforms import AutoAugment as Published
    from torchvision.transforms import AutoAugmentPolicy

    policies = Published(AutoAugmentPolicy(learned)).policies
    rows = [[(OPERATIONS.index(name), level or 0, odds) for name, odds, level in policy] for policy in policies]
    return np.array(rows).transpose(2, 0, 1)


@lru_cache(maxsize=16)
def _magnitudes(family: str, height: int, width: int) -> NDArray[np.float64]:
    """`[operations, levels]`, without sign, as torchvision has them: shear, pixels, degrees, change of a factor, bits, threshold."""
    levels, wide = _LEVELS[family], family == "trivialaugment"
    table = np.zeros((len(OPERATIONS), levels))
    factor = 0.99 if wide else 0.9
    ends = {
        "ShearX": 0.99 if wide else 0.3,
        "ShearY": 0.99 if wide else 0.3,
        "TranslateX": 32.0 if wide else 150.0 / 331.0 * width,
        "TranslateY": 32.0 if wide else 150.0 / 331.0 * height,
        "Rotate": 135.0 if wide else 30.0,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), factor),
    }
    for name, end in ends.items():
        table[OPERATIONS.index(name)] = torch.linspace(0.0, end, levels)
    table[_TRANSLATE_X : _TRANSLATE_Y + 1] = np.trunc(table[_TRANSLATE_X : _TRANSLATE_Y + 1])  # whole pixels
    bits_lost = torch.arange(levels) / ((levels - 1) / (6 if wide else 4))
    table[OPERATIONS.index("Posterize")] = (8 - bits_lost).round()
    table[OPERATIONS.index("Solarize")] = torch.linspace(1.0, 0.0, levels)
    return table


def augment(images: Tensor, codes: Codes, magnitudes: Magnitudes) -> Tensor:
    """Do to each image what was drawn for it.

    Each result is that of torchvision's v2 transforms on the single image, with nearest-neighbour interpolation and black outside; where a
    place lies exactly between two pixels, rounding decides. Images of one kind of operation are changed together.

    Args:
        images: `[B, C, H, W]`, uint8, C = 1 or 3; unchanged.
        codes: `[num_ops, B]`, positions in `OPERATIONS`.
        magnitudes: `[num_ops, B]`.

    Returns:
        `[B, C, H, W]`, uint8.
    """
    for step, strengths in zip(codes, magnitudes, strict=True):
        kinds = _KINDS[step]
        order = np.argsort(kinds, kind="stable")
        present, sizes = np.unique(kinds, return_counts=True)
        ends = sizes.cumsum()
        groups = torch.tensor_split(images.index_select(0, _to_device(order, images.device)), ends[:-1].tolist())
        changed = [
            _FUNCTIONS[kind](group, step[order[end - len(group) : end]], strengths[order[end - len(group) : end]])
            for kind, group, end in zip(present, groups, ends, strict=True)
        ]
        images = torch.cat(changed).index_select(0, _to_device(np.argsort(order), images.device))
    return images


def _to_device(values: NDArray[Any], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(values)
    return tensor.to(_widest_dtype(tensor.dtype, device)).to(device, non_blocking=True)


def _widest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype, or float32 in place of float64 on a device without it; there a pixel may round to the next number."""
    return torch.float32 if dtype == torch.float64 and not has_float64(device) else dtype


def _affine(images: Tensor, codes: Codes, magnitudes: Magnitudes) -> Tensor:
    """Shear about the top left corner, translate, or rotate about the centre."""
    batch, _, height, width = images.shape
    shear_x, shear_y = np.where(codes == _SHEAR_X, magnitudes, 0.0), np.where(codes == _SHEAR_Y, magnitudes, 0.0)
    angle = np.radians(np.where(codes == _ROTATE, magnitudes, 0.0))
    # from a place in the result to the place it is taken from, both measured from the centre
    theta = np.zeros((batch, 2, 3))
    theta[:, 0, 0] = theta[:, 1, 1] = np.cos(angle)
    theta[:, 0, 1] = shear_x - np.sin(angle)
    theta[:, 1, 0] = shear_y + np.sin(angle)
    theta[:, 0, 2] = shear_x * height / 2 - np.where(codes == _TRANSLATE_X, magnitudes, 0.0)
    theta[:, 1, 2] = shear_y * width / 2 - np.where(codes == _TRANSLATE_Y, magnitudes, 0.0)
    scaled = theta.astype(np.float32) / np.array([[0.5 * width], [0.5 * height]], np.float32)
    by_x, by_y, shift = _to_device(scaled, images.device).view(batch, 2, 3, 1, 1).unbind(2)
    x, y = (torch.arange(size, device=images.device) - (size - 1) / 2 for size in (width, height))
    grid = torch.addcmul(by_x * x, by_y, y.view(-1, 1)).add_(shift).permute(0, 2, 3, 1)
    moved = F.grid_sample(images.to(torch.float32), grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return _pixels(moved)


def _add_product(summand: Tensor, values: Tensor, factor: Tensor) -> Tensor:
    """`summand + values·factor` in float32, rounded once as torch's fused `add(…, alpha=…)` does; that takes one factor for all."""
    dtype = _widest_dtype(torch.float64, summand.device)
    return torch.addcmul(summand.to(dtype), values.to(dtype), factor).to(torch.float32)


def _pixels(values: Tensor) -> Tensor:
    return values.clamp_(0, 255).to(torch.int16).to(torch.uint8)  # three times as quick as at once, on a processor


def _enhance(images: Tensor, codes: Codes, magnitudes: Magnitudes) -> Tensor:
    """Change brightness, colour or contrast: mix with black, with the grey image, or with its mean."""
    change = _to_device(magnitudes, images.device).view(-1, 1, 1, 1)
    grey = _grey(images)
    code = _to_device(codes, images.device).view(-1, 1, 1, 1)
    other = grey.where(code == _COLOR, grey.mean((2, 3), keepdim=True)).mul_(code != _BRIGHTNESS)
    factor = 1.0 + change
    scaled = images.to(torch.float32).mul_(factor.to(torch.float32))
    mixed = _add_product(scaled, other, (1.0 - factor).to(torch.float32))
    return _pixels(mixed if images.shape[1] == 3 else mixed.where(code != _COLOR, images))


def _grey(images: Tensor) -> Tensor:
    """`[B, 1, H, W]` float32, whole numbers."""
    if images.shape[1] == 1:
        return images.to(torch.float32)
    red, green, blue = images.unbind(1)
    return red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_().unsqueeze(1)


def _sharpen(images: Tensor, _: Codes, magnitudes: Magnitudes) -> Tensor:
    height, width = images.shape[-2:]
    if height <= 2 or width <= 2:
        return images
    result = images.to(torch.float32)
    inside = result[..., 1:-1, 1:-1]
    # the kernel, 1s around a 5, as two sums of three; several times as quick as a convolution, and whole numbers
    rows = result[..., :-2, :] + result[..., 1:-1, :] + result[..., 2:, :]
    blurred = (rows[..., :-2] + rows[..., 1:-1] + rows[..., 2:]).add_(inside, alpha=4).div_(13).round_()
    change = _to_device(1.0 - (1.0 + magnitudes), images.device).to(torch.float32).view(-1, 1, 1, 1)
    inside.copy_(_add_product(inside, blurred.sub_(inside), change))
    return _pixels(result)


def _posterize(images: Tensor, _: Codes, bits: Magnitudes) -> Tensor:
    masks = (256 - 2 ** (8 - bits)).astype(np.uint8)
    return images & _to_device(masks, images.device).view(-1, 1, 1, 1)


def _solarize(images: Tensor, _: Codes, thresholds: Magnitudes) -> Tensor:
    lowest = np.ceil((255.0 * thresholds).astype(np.float32)).astype(np.uint8)  # of the values that change
    bound = _to_device(lowest, images.device).view(-1, 1, 1, 1)
    # `where(images >= bound, ~images, images)`, several times as quick on a processor
    changes = torch.maximum(images, bound) == images
    return images ^ changes.to(torch.uint8).neg_()


def _autocontrast(images: Tensor, *_: object) -> Tensor:
    values = images.to(torch.float32)
    lowest, highest = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    flat = lowest == highest
    scale = highest.sub_(lowest).mul_(1 / 255).masked_fill_(flat, 1.0)
    return _pixels(values.sub_(lowest.masked_fill_(flat, 0.0)).div_(scale))


def _equalize(images: Tensor, *_: object) -> Tensor:
    """Spread each channel's histogram by Pillow's table."""
    levels = images.flatten(2).to(torch.int64)
    counts = torch.zeros((*levels.shape[:2], 256), dtype=torch.int32, device=images.device)
    counts.scatter_add_(2, levels, counts.new_ones(1).expand_as(levels))
    below = counts.cumsum(2, dtype=torch.int32) - counts
    brightest = counts.gather(2, levels.amax(2, keepdim=True))
    step = (levels.shape[2] - brightest).div_(255, rounding_mode="floor")
    table = below.add_(step // 2).div_(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    table = torch.where(step == 0, torch.arange(256, dtype=torch.int32, device=images.device), table)
    return table.to(torch.uint8).gather(2, levels).view_as(images)


# what changes the images of each operation; one function, for all images of it at once, may stand for several
_FUNCTIONS: tuple[Callable[[Tensor, Codes, Magnitudes], Tensor], ...] = (
    lambda images, *_: images,
    *(_affine,) * 5,
    *(_enhance,) * 3,
    _sharpen,
    _posterize,
    _solarize,
    _autocontrast,
    _equalize,
    lambda images, *_: ~images,
)
_KINDS = np.array([_FUNCTIONS.index(function) for function in _FUNCTIONS])
