"""What a training can add to its loss: penalties on features and embeddings, as means over the step's images.

Each is the mean over the images of this process, of which the mean over processes, weighted by their numbers of images, is that of the
whole batch; so are the gradients.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from etflight.checkpoint.hyperparameters import require
from etflight.utils.precision import at_least_float32, no_autocast
from etflight.utils.ranks import sum_over_ranks


def check_factors(given: Mapping[str, Any]) -> None:
    """Refuse a model's factors `feature_penalty` and `center_pull` that are negative or not finite; see `Classifier`.

    Raises:
        UserError: One of them is.
    """
    for name in ("feature_penalty", "center_pull"):
        require(given, name, lambda factor: 0 <= factor < math.inf, "give a finite factor, not negative, 0 for none")


def feature_penalty(features: Tensor) -> Tensor:
    """Compute half the mean squared norm, `1/2 · mean ‖h‖²`.

    Args:
        features: The features `[B, d]`, any float dtype.

    Returns:
        A scalar, float32 or float64.

    Source:
        Hasegawa and Sato, ICLR 2024, who add 0.01 times this to the loss.
    """
    return at_least_float32(features).square().sum(dim=1).mean() / 2


def center_pull(embedding: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Compute half the spread within classes, each of which counts the same: `1/2 · (1/U) Σ_c (1/n_c) Σ_{i∈c} ‖e_i - μ_c‖²`.

    μ_c is the mean and n_c the number of the embeddings of class c, U the number of classes present, all over every process of the step.
    The means are detached, which changes no gradient.

    Args:
        embedding: The embeddings `[B, d']`, any float dtype.
        target: The class indices `[B]`, int64.
        num_classes: The number of classes K; time and memory are O(K·(B + d')).

    Returns:
        A scalar, float32 or float64. In a process group, every process of the step must call it.
    """
    embedding = at_least_float32(embedding)
    with torch.no_grad(), no_autocast(embedding.device):
        # a product, because adding at indices is not deterministic on a GPU
        member = (target == torch.arange(num_classes, device=target.device)[:, None]).to(embedding.dtype)
        sums = sum_over_ranks(member @ F.pad(embedding, (0, 1), value=1.0))  # the last column counts
        counts = sums[:, -1].clamp(min=1)
        means = sums[:, :-1] / counts[:, None]
        weights = sums[:, -1].sum() / (sums[:, -1] > 0).sum() / counts
    return (weights[target] * (embedding - means[target]).square().sum(dim=1)).mean() / 2
