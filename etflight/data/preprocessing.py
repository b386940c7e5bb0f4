"""How images are prepared for a model: the data module knows it, the checkpoint keeps it, predict and export need it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from etflight.utils.errors import UserError
from etflight.utils.limits import fits

LARGEST_SIDE = 2**14  # one such image is 805 MB
LEAST_CROP = 0.1  # with less, the image would be resized to a side of more than ten times what is kept


class Preprocessing(NamedTuple):
    """How an image is prepared for a model.

    The image is resized with its proportions kept until it just covers H × W, each divided by `crop_pct`, and H × W is cropped at the
    centre; its pixels, from 0 to 255, become `(x/255 - mean)/std`.

    Attributes:
        input_size: C, H and W.
        mean: The mean of each channel, C numbers.
        std: The standard deviation of each channel, C numbers > 0.
        crop_pct: The part of the resized image that is kept, from 0.1 to 1; timm's name.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0

    def unlike(self, other: Self) -> str | None:
        """Describe for people how this differs from another; None if they are equal."""

        def described(one: Self) -> dict[str, object]:
            _, height, width = one.input_size
            size = f"{height}×{width} pixels"
            return {"": size, "mean ": list(one.mean), "std ": list(one.std), "crop_pct ": one.crop_pct}

        pairs = zip(described(self).items(), described(other).values(), strict=True)
        return ", ".join(f"{name}{own} instead of {known}" for (name, own), known in pairs if own != known) or None

    @classmethod
    def in_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Self | None:
        """Return the preprocessing that a checkpoint holds, as `_asdict` gives it; None if it holds none.

        Raises:
            UserError: The checkpoint's value is invalid.
        """
        value = checkpoint.get("preprocessing")
        if value is None:
            return None
        if not isinstance(value, dict) or value.keys() != set(cls._fields):
            raise UserError(f"the preprocessing in the checkpoint has to hold {', '.join(cls._fields)}")
        size, mean, std, crop_pct = (value[name] for name in cls._fields)
        number, sized = (int, float), fits(size, [int]) and len(size) == 3
        for name, fine in (
            ("input_size", sized and all(1 <= side <= LARGEST_SIDE for side in size)),
            ("mean", sized and fits(mean, [number]) and len(mean) == size[0] and all(map(math.isfinite, mean))),
            ("std", sized and fits(std, [number]) and len(std) == size[0] and all(0 < one < math.inf for one in std)),
            ("crop_pct", fits(crop_pct, number) and LEAST_CROP <= crop_pct <= 1),
        ):
            if not fine:
                raise UserError(f"in the checkpoint's preprocessing, {name} is {value[name]!r:.60}")
        return cls((size[0], size[1], size[2]), tuple(map(float, mean)), tuple(map(float, std)), float(crop_pct))
