"""Which training images of a set are kept, and with which labels: long-tailed profiles, the choice by class, and wrong labels."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from etflight.utils.errors import UserError

Profile = Literal["exp", "step", "none"]
NoiseKind = Literal["symmetric", "pair"]
Indices = NDArray[np.int64]
_MOST = 2**53  # beyond it, float64 skips integers; profiles are computed in float64


def class_counts(
    num_classes: int, max_count: int, imbalance_ratio: float = 1.0, profile: Profile = "exp"
) -> NDArray[np.int64]:
    """Training images per class of a long-tailed profile, largest class first.

    Args:
        num_classes: K, at least 2.
        max_count: n_max, the images of class 0, at least 1.
        imbalance_ratio: n_max / n_min, at least 1; 1 is balanced.
        profile: `"exp"`: `int(n_max · ratio^(-k/(K-1)))`; `"step"`: the first K//2 classes full, the others
            `int(n_max / ratio)`; `"none"`: every class full, whatever the ratio.

    Returns:
        `[K]` int64, truncated as the field does. A class may come out at 0 where `ratio > n_max`.

    Raises:
        UserError: An argument is out of range, or the profile is unknown.

    Example:
        >>> class_counts(10, 5000, 100).tolist()
        [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
        >>> class_counts(4, 500, 10, "step").tolist()
        [500, 500, 50, 50]
    """
    if num_classes < 2:
        raise UserError(f"num_classes is {num_classes}: a profile needs at least two classes")
    if not 1 <= max_count <= _MOST:
        raise UserError(f"max_count is {max_count}: the largest class needs at least one image, and at most 2**53")
    if not imbalance_ratio >= 1:
        raise UserError(
            f"imbalance_ratio is {imbalance_ratio}: it is n_max / n_min, so give 1 (balanced) or more, not its inverse"
        )
    if profile == "exp":
        counts = [int(max_count * imbalance_ratio ** (-k / (num_classes - 1))) for k in range(num_classes)]
    elif profile == "step":
        full = num_classes // 2
        counts = [max_count] * full + [int(max_count / imbalance_ratio)] * (num_classes - full)
    elif profile == "none":
        counts = [max_count] * num_classes
    else:
        raise UserError(
            f"profile {profile!r} is unknown: give one of {', '.join(get_args(Profile))}, or explicit counts"
        )
    return np.array(counts, dtype=np.int64)


def training_counts(
    available: ArrayLike,
    imbalance_ratio: float = 1.0,
    profile: Profile | Sequence[int] = "exp",
    max_count: int | None = None,
    class_names: Sequence[str] | None = None,
) -> NDArray[np.int64]:
    """Images that each class of a real set keeps.

    Args:
        available: `[K]`, the images each class has, each at least 1.
        imbalance_ratio: n_max / n_min, at least 1.
        profile: A profile of `class_counts`, or the K counts themselves.
        max_count: n_max. None takes the largest that every class can satisfy, and keeps the set as it is where there
            is nothing to shape (ratio 1, or profile `"none"`, which only caps each class at `max_count`).
        class_names: `[K]`, for the error messages.

    Returns:
        `[K]` int64, each between 1 and `available`.

    Raises:
        UserError: A class has fewer images than are asked for, or would be left with none.
    """
    has = np.asarray(available, dtype=np.int64)
    names = list(class_names) if class_names is not None else [str(k) for k in range(len(has))]

    def refuse(classes: Indices, problem: str) -> UserError:
        k = int(classes[0])
        others = f" (and {len(classes) - 1} more)" if len(classes) > 1 else ""
        return UserError(f"class {k} ({names[k]}){others} {problem}")

    if (empty := np.flatnonzero(has == 0)).size:
        raise refuse(empty, "has no training image: every class needs at least one, so leave it out or add some")

    mend = "lower its count in the profile"
    if not isinstance(profile, str):
        if most := [count for count in profile if abs(count) > _MOST]:
            raise UserError(f"profile gives a class {most[0]} images: give counts of at most 2**53")
        asked = np.asarray(profile, dtype=np.int64)
        if asked.shape != has.shape:
            raise UserError(f"profile gives {asked.size} counts for {has.size} classes: give one count per class")
    elif profile == "none":
        asked = has if max_count is None else np.minimum(has, class_counts(len(has), max_count, profile="none"))
    elif max_count is None and imbalance_ratio == 1:
        asked = has
    else:

        def counts(n_max: int) -> NDArray[np.int64]:
            return class_counts(len(has), n_max, imbalance_ratio, profile)

        # Counts grow with n_max, so the first n_max that asks too much ends the search.
        candidates = range(1, int(has.max()) + 1)
        largest = bisect_right(candidates, False, key=lambda n_max: bool((counts(n_max) > has).any()))
        asked = counts(largest if max_count is None else max_count)
        mend = f"lower max_count to {largest} or less"

    if (short := np.flatnonzero(asked > has)).size:
        k = short[0]
        raise refuse(short, f"has {has[k]} training images, {asked[k]} were asked for: {mend}")
    if (none_left := np.flatnonzero(asked < 1)).size:
        mend = "lower imbalance_ratio, or raise max_count or its count in the profile"
        raise refuse(none_left, f"is left with {asked[none_left[0]]} images: {mend}")
    return asked


def positions_by_class(labels: ArrayLike, num_classes: int) -> list[Indices]:
    """The positions of each class's labels in ascending order, for labels `[N]` in 0 … K-1."""
    # one stable sort instead of K scans
    return np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels, minlength=num_classes))[:-1])


def long_tailed_subset(labels: ArrayLike, counts: ArrayLike, seed: int = 0) -> Indices:
    """Choose `counts[k]` images of each class k by the field's rule.

    With `numpy.random.RandomState(seed)`, in class order, shuffle the class's indices and keep the first n_k.

    Args:
        labels: `[N]`, integers in 0 … K-1.
        counts: `[K]`, images to keep; a class that has fewer keeps all of them.
        seed: 0 … 2³² - 1; 0 is what published subsets use.

    Returns:
        `[Σ n_k]` int64 positions in `labels`, in class order.
    """
    rng = np.random.RandomState(seed)
    wanted = np.asarray(counts)
    chosen = []
    for indices, count in zip(positions_by_class(labels, len(wanted)), wanted, strict=True):
        rng.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen)


def noisy_labels(labels: Indices, num_classes: int, part: float, kind: NoiseKind, seed: int) -> Indices:
    """Give a part of each class's images a wrong label.

    Args:
        labels: `[N]`, in 0 … K-1.
        num_classes: K.
        part: The part of each class, from 0 to 1; its number of images is rounded.
        kind: "symmetric": each of the other classes alike; "pair": the next class, after the last the first.
        seed: Chooses the images, and for "symmetric" their labels.

    Returns:
        A copy of the labels, `[N]`, of which `rint(part · n_k)` of each class are wrong.
    """
    rng = np.random.default_rng(seed)
    noisy = labels.copy()
    for k, own in enumerate(positions_by_class(labels, num_classes)):
        wrong = rng.permutation(own)[: int(np.rint(part * len(own)))]
        steps = rng.integers(1, num_classes, len(wrong)) if kind == "symmetric" else 1
        noisy[wrong] = (k + steps) % num_classes
    return noisy


def fingerprint(indices: ArrayLike) -> str:
    """Twelve hexadecimal digits (SHA-256 of the little-endian int64 bytes) that identify a choice of images."""
    return hashlib.sha256(np.asarray(indices).astype("<i8").tobytes()).hexdigest()[:12]
