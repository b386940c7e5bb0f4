"""What several losses compute alike, from logits and class counts."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from etflight.utils.precision import at_least_float32


def cross_entropies(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropies `[B]` of class indices; none of them means "ignore", as -100 does in torch."""
    no_class = torch.iinfo(torch.int64).min
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing, ignore_index=no_class)


def log_prior(class_counts: Tensor) -> Tensor:
    """Compute `log π`, `[K]`, of the class frequencies, in float64 for float64 counts, else in float32.

    A class without images counts as the rarest that has some.
    """
    counts = counts_with_rarest_for_none(class_counts)
    return (counts / counts.sum()).log()


def counts_with_rarest_for_none(class_counts: Tensor) -> Tensor:
    """The counts `[K]` as floats, where a class without images has the count of the rarest that has some."""
    counts = at_least_float32(class_counts)
    return torch.where(counts > 0, counts, counts.where(counts > 0, math.inf).min())


def at_target(values: Tensor, target: Tensor) -> Tensor:
    """`Σ_k t_k v_k`, `[B]`, of values `[B, K]`."""
    if target.is_floating_point():
        return (target * values).sum(dim=1)
    return values.gather(1, target[:, None]).squeeze(1)


def count_classes(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """The counts `[K]` of class indices `[B]`."""
    # index_add_, because bincount synchronises with the host on a GPU
    ones = torch.ones_like(target, dtype=dtype)
    return ones.new_zeros(num_classes).index_add_(0, target, ones)
