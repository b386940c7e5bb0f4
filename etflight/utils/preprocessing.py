"""How images are prepared for a model: the data module knows it, the checkpoint keeps it, predict and export need it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

_LARGEST_SIDE = 2**14


class Preprocessing(NamedTuple):
    """How an image is prepared for a model.

    The image is resized with its proportions kept until it just covers H × W, each divided by `crop_pct`, and H × W is cropped at the
    centre; its pixels, from 0 to 255, become `(x/255 - mean)/std`.

    Attributes:
        input_size: C, H and W.
        mean: The mean of each channel, C numbers.
        std: The standard deviation of each channel, C numbers > 0.
        crop_pct: The part of the resized image that is kept, in (0, 1]; timm's name.
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
        """Return the preprocessing that a checkpoint holds; None if it holds none.

        Raises:
            ValueError: The checkpoint's value is invalid.
        """
        known = checkpoint.get("preprocessing")
        return None if known is None else cls.from_plain(known)

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Make it from the result of `_asdict`, perhaps from a file that somebody else wrote.

        Raises:
            ValueError: The value is invalid.
        """
        if not isinstance(value, dict) or value.keys() != set(cls._fields):
            raise ValueError(f"it has to hold {', '.join(cls._fields)}")
        size, mean, std, crop_pct = (value[name] for name in cls._fields)
        if not _are(int, size, 3) or not all(1 <= side <= _LARGEST_SIDE for side in size):
            raise ValueError(f"its input_size is {size!r:.60}")
        for name, numbers in (("mean", mean), ("std", std)):
            if not _are((int, float), numbers, size[0]) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"its {name} is {numbers!r:.60} for {size[0]} channels")
        if min(std) <= 0:
            raise ValueError(f"its std is {std!r:.60}")
        if not isinstance(crop_pct, float) or not 0 < crop_pct <= 1:
            raise ValueError(f"its crop_pct is {crop_pct!r:.60}")
        return cls((size[0], size[1], size[2]), tuple(map(float, mean)), tuple(map(float, std)), crop_pct)


def _are(kind: type | tuple[type, ...], values: object, length: int) -> bool:
    return (
        isinstance(values, Sequence)
        and len(values) == length
        and all(isinstance(value, kind) and not isinstance(value, bool) for value in values)
    )
