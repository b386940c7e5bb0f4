"""How a published training set is divided: images held out, images trained on and their labels."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from etflight.data.profiles import Indices, NoiseKind, Profile, long_tailed_subset, noisy_labels, training_counts


class DivisionOptions(Protocol):
    """The options of a data module that say which images are trained on."""

    imbalance_ratio: float
    profile: Profile | list[int]
    max_count: int | None
    seed: int
    val_fraction: float
    label_noise: float
    noise_kind: NoiseKind


class Division(NamedTuple):
    """The training images of a set, and those held out from them.

    Attributes:
        train: Int64 `[N]` positions in the published training set.
        labels: Int64 `[N]`, what is trained on.
        val: Int64 positions of the images held out; None if there are none.
        thinned: The number of classes of which `val_fraction`, being less, takes a third or more.
    """

    train: Indices
    labels: Indices
    val: Indices | None
    thinned: int


def divide(labels: Indices, class_names: Sequence[str], options: DivisionOptions) -> Division:
    """Hold out validation images first, then apply the profile to the rest, then give labels their noise.

    Args:
        labels: `[N]`, of the published training set, in 0 … K-1.
        class_names: `[K]`.
        options: The options of the data module.

    Raises:
        UserError: A class cannot satisfy the profile.
    """
    K, pool = len(class_names), np.arange(len(labels))
    val, thinned = None, 0
    if options.val_fraction > 0:
        sizes = np.bincount(labels, minlength=K)
        most = np.maximum(sizes - 1, 0)
        held_out = np.clip(np.rint(sizes * options.val_fraction), 1, None).clip(max=most).astype(np.int64)
        if 3 * options.val_fraction < 1:
            thinned = int((3 * held_out >= sizes)[held_out > 0].sum())
        val = np.sort(long_tailed_subset(labels, held_out, options.seed))
        pool = np.setdiff1d(pool, val, assume_unique=True)
    available = np.bincount(labels[pool], minlength=K)
    counts = training_counts(
        available, options.imbalance_ratio, options.profile, options.max_count, class_names=class_names
    )
    if (counts < available).any():
        pool = pool[long_tailed_subset(labels[pool], counts, options.seed)]
    kept = labels[pool]
    if options.label_noise:
        kept = noisy_labels(kept, K, options.label_noise, options.noise_kind, options.seed)
    return Division(pool, kept, val, thinned)
