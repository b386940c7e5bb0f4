"""Heads on the sphere that have no closed form, on features that are in memory: a learnt cosine head, and dot regression to a frame."""

import torch
import torch.nn.functional as F
from torch import Tensor

from etflight.closed_form.lbfgs import Evaluation, minimise
from etflight.utils.precision import at_least_float32


def cosine_regression(
    embedding: Tensor,
    labels: Tensor,
    start: Tensor,
    scale: float,
    *,
    offset: Tensor | None = None,
    tolerance: float = 1e-4,
) -> Tensor:
    """Find class vectors that minimise the cross-entropy of `scale` times the cosines; the scale regularises.

    Args:
        embedding: The embeddings `[N, d]`, of which only directions count.
        labels: The class indices `[N]`, int64.
        start: The class vectors `[K, d]` to begin with, such as class means: the problem is not convex.
        scale: The factor of the cosines, > 0.
        offset: What is added to the logits, `[K]`, such as `log π`: the prior in the loss.
        tolerance: The largest entry of the gradient at the solution, for class vectors of norm 1.

    Returns:
        The class vectors `[K, d]`, unit rows.

    Raises:
        UserError: The tolerance is not reached.
    """
    rows = F.normalize(at_least_float32(embedding), dim=1)
    added = None if offset is None else offset.to(rows)

    def evaluate(point: Tensor) -> Evaluation:
        norms = point.norm(dim=1, keepdim=True)
        unit = point / norms
        logits = rows @ unit.T * scale
        log_p = F.log_softmax(logits if added is None else logits + added, dim=1)
        loss = F.nll_loss(log_p.double(), labels)
        residual = log_p.exp_()
        residual[torch.arange(len(residual), device=residual.device), labels] -= 1
        gradient = residual.T @ rows * (scale / len(rows))
        return loss, (gradient - unit * (unit * gradient).sum(dim=1, keepdim=True)) / norms

    found = minimise(
        evaluate, F.normalize(start.to(rows), dim=1), lambda gradient: float(gradient.abs().max()) <= tolerance
    )
    return F.normalize(found, dim=1)


def dot_regression(
    embedding: Tensor,
    labels: Tensor,
    frame: Tensor,
    penalty: float,
    *,
    class_weights: Tensor | None = None,
    tolerance: float = 1e-5,
) -> Tensor:
    """Find the linear map A behind which embeddings have the smallest dot-regression loss to a fixed frame, `(1/2) (<v_y, ĥ> - 1)²`.

    With `ĥ = A h/‖A h‖` that is `(1/8) ‖ĥ - v_y‖⁴`, so unlike the least squares of ridge it has no linear solution. In the fit
    `ĥ = A h / √(1 + ‖A h‖²)`: it is as good as normalised where A h is long, and smooth where a sample is drawn to both sides of the
    origin. `(penalty/2) ‖A‖²` keeps A h short for embeddings that little is known of.

    Args:
        embedding: The embeddings `[N, d]`.
        labels: The class indices `[N]`, int64.
        frame: The class vectors `[K, d]`, unit rows that sum to zero.
        penalty: The factor of `‖A‖²/2`, > 0.
        class_weights: The weight of a sample of each class, `[K]`; None weighs all alike.
        tolerance: The largest entry of the gradient at the solution.

    Returns:
        A `[d, d]`; it maps to the span of the frame.

    Raises:
        UserError: The tolerance is not reached.

    Source:
        Yang et al. 2022, arXiv 2203.09081, equation 11, on a frozen backbone.
    """
    rows = at_least_float32(embedding)
    span = (
        torch.linalg.svd(frame.double(), full_matrices=False).Vh[: len(frame) - 1].to(rows)
    )  # [K - 1, d], orthonormal
    targets = (frame.to(rows) @ span.T)[labels]
    weights = torch.ones_like(rows[:, 0]) if class_weights is None else class_weights.to(rows)[labels]
    weights = (weights / weights.sum())[:, None]

    def evaluate(point: Tensor) -> Evaluation:
        mapped = rows @ point.T
        lengths = (1 + mapped.square().sum(dim=1, keepdim=True)).sqrt()
        short = mapped / lengths
        missing = (short * targets).sum(dim=1, keepdim=True) - 1
        loss = (weights.double() * missing.double().square()).sum() / 2
        pull = weights * missing * (targets - (missing + 1) * short) / lengths
        return loss + penalty / 2 * point.square().sum(dtype=torch.float64), pull.T @ rows + penalty * point

    # ridge to the vertices: a start that points every embedding roughly where it belongs
    covariance = (weights * rows).T @ rows
    covariance.diagonal().add_(penalty)
    start = torch.linalg.solve(covariance, (weights * rows).T @ targets).T
    A: Tensor = span.T @ minimise(evaluate, start, lambda gradient: float(gradient.abs().max()) <= tolerance)
    return A
