"""What the options of a data module may be, as far as no file is needed to tell."""

import math
from collections.abc import Callable
from typing import Any, get_args

from etflight.data.profiles import NoiseKind, Profile


def _is_alpha(value: float) -> bool:
    # below 1e-6, λ is 0 or 1 in all but one batch of a million, until Beta(α, α) underflows
    return value == 0 or 1e-6 <= value < math.inf


def _all_within(values: list[float], low: float, high: float) -> bool:
    return values != [] and all(low <= value <= high for value in values)


def names_of(literal: object) -> str:
    """The values of a `Literal` in words."""
    return ", ".join(get_args(literal))


# by option, what its value must be unless it is None, and the rule for people
RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "imbalance_ratio": (lambda ratio: ratio >= 1, "n_max / n_min is 1 (balanced) or more, not its inverse"),
    "profile": (
        lambda profile: not isinstance(profile, str) or profile in get_args(Profile),
        f"give {names_of(Profile)}, or explicit counts",
    ),
    "max_count": (lambda count: count >= 1, "give at least 1, or leave it out"),
    "seed": (lambda seed: 0 <= seed < 2**32, "give an integer from 0 to 2**32 - 1"),
    "val_fraction": (lambda part: 0 <= part < 1, "give a part of the training images, from 0 to below 1"),
    "label_noise": (lambda part: 0 <= part < 1, "give a part of the training labels, from 0 to below 1"),
    "noise_kind": (lambda kind: kind in get_args(NoiseKind), f"give {names_of(NoiseKind)}"),
    "batch_size": (lambda size: 1 <= size < 2**31, "give at least 1, and less than 2**31"),
    "eval_batch_size": (lambda size: 1 <= size < 2**31, "give at least 1 and less than 2**31, or leave it out"),
    "num_workers": (lambda number: number >= 0, "give 0 (load in the main process) or more"),
    "crop_padding": (lambda pixels: pixels >= 0, "give 0 (no crop) or more pixels"),
    "color_jitter": (lambda change: 0 <= change <= 1, "factors are 1 ± it: give 0 (off) to 1"),
    "cutout": (lambda side: side >= 0, "give 0 (off) or the side of a square in pixels"),
    "random_erasing": (lambda probability: 0 <= probability <= 1, "give a probability from 0 (off) to 1"),
    "views": (
        lambda number: 1 <= number < 2**31,
        "give 1, or more (below 2**31) for several augmentations of each image",
    ),
    "mixup": (_is_alpha, "α is 0 (off), or finite and 1e-6 or more"),
    "cutmix": (_is_alpha, "α is 0 (off), or finite and 1e-6 or more"),
    "mean": (lambda values: _all_within(values, 0, 1), "give numbers from 0 to 1, of pixels divided by 255"),
    "std": (lambda values: _all_within(values, 1e-3, 1e3), "give numbers from 0.001 to 1000, of pixels divided by 255"),
}
