"""Logistic regression on features that are in memory: solved to a stated gradient, not trained."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from etflight.closed_form.lbfgs import Evaluation, minimise
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32


class LogisticRegression:
    """Multinomial logistic regression: `Σ_i w_i CE(W h_i + b + o, y_i) / Σ_i w_i + (penalty/2) ‖W‖²`, with the biases free.

    It is solved by L-BFGS in the eigenbasis of the features' covariance, with each coordinate scaled by the curvature it has at the start:
    the scaled problem needs a fraction of the steps. The solution is unique (up to a number that all biases share) and the same each time.

    Args:
        features: The features or embeddings `[N, d]`; those of float32 are computed with in float32.
        labels: The class indices `[N]`, int64.
        num_classes: The number of classes K.
        class_weights: The weight of a sample of each class, `[K]`; None weighs all alike.
        offset: What is added to the logits in training, `[K]`, such as `log π`: the prior in the loss. None adds nothing.

    Raises:
        UserError: Features and labels are not of the same samples, or a label has no class.

    Source:
        With w = 1 and o = 0 it is scikit-learn's `LogisticRegression(C=1/(N · penalty))`. The prior in the loss is that of Menon et al.,
        ICLR 2021, arXiv 2007.07314, and Ren et al., NeurIPS 2020, arXiv 2007.10740.
    """

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        num_classes: int,
        *,
        class_weights: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> None:
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise UserError(
                f"features {list(features.shape)} and labels {list(labels.shape)}: give [N, d] and [N], N > 0"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
            raise UserError(f"labels lie outside [0, {num_classes}): is num_classes right?")
        features = at_least_float32(features)
        self.labels, self.num_classes = labels, num_classes
        self._weights = None if class_weights is None else class_weights.to(features)[labels]
        self._offset = torch.zeros(num_classes).to(features) if offset is None else offset.to(features)
        self._centre = features.mean(dim=0)
        centred = features - self._centre
        self._spread, self._basis = torch.linalg.eigh(centred.T @ centred / len(centred))
        self._rotated = centred @ self._basis

    def path(
        self, penalties: Sequence[float], rows: Tensor | None = None, *, tolerance: float = 1e-4
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Solve it for one penalty after the other, each from the solution of the last: give them from large to small.

        Args:
            penalties: The penalties, > 0.
            rows: The indices of the samples that count, `[n]`; None: all of them.
            tolerance: The largest entry of the gradient with respect to W and b at the solution, as scikit-learn's `tol`.

        Yields:
            Class vectors W `[K, d]` and biases b `[K]` for features as they were given, in their precision; the biases have mean 0.

        Raises:
            UserError: A penalty is not positive, or the tolerance is not reached.
        """
        problem = _Problem(
            self._rotated if rows is None else self._rotated[rows],
            self.labels if rows is None else self.labels[rows],
            self._weights if rows is None or self._weights is None else self._weights[rows],
            self._offset,
        )
        solution = self._rotated.new_zeros(self.num_classes, self._rotated.shape[1] + 1)
        for penalty in penalties:
            if not penalty > 0:
                raise UserError(f"the penalty of logistic regression is {penalty}: give a positive number")
            scale = problem.scale(solution, self._spread, penalty)

            def is_done(gradient: Tensor, scale: Tensor = scale) -> bool:
                return self._largest(gradient / scale, tolerance) <= tolerance

            def evaluate(point: Tensor, scale: Tensor = scale, penalty: float = penalty) -> Evaluation:
                value, gradient = problem.evaluate(point * scale, penalty)
                return value, gradient * scale

            solution = minimise(evaluate, solution / scale, is_done) * scale
            weight = solution[:, :-1] @ self._basis.T
            bias = solution[:, -1] - weight @ self._centre
            yield weight, bias - bias.mean()

    def _largest(self, gradient: Tensor, tolerance: float) -> float:
        """The largest entry of a gradient in the coordinates of the features, or a bound of it that decides as well.

        With `b = b' - W m` and m the centre, the gradient with respect to W is that in centred coordinates plus that of b' times m.
        """
        norm = float(gradient.norm())
        if norm > tolerance * gradient.numel() ** 0.5 * (1 + float(self._centre.norm())):
            return norm
        of_bias = gradient[:, -1]
        of_weight = gradient[:, :-1] @ self._basis.T + of_bias[:, None] * self._centre
        return float(torch.maximum(of_weight.abs().max(), of_bias.abs().max()))


class _Problem:
    """The objective of some samples, as a function of `[K, d + 1]`: class vectors, and biases in the last column."""

    def __init__(self, features: Tensor, labels: Tensor, weights: Tensor | None, offset: Tensor) -> None:
        self.features, self.labels, self.offset = features, labels, offset
        weights = torch.ones_like(features[:, 0]) if weights is None else weights
        self.weights = weights / weights.sum()

    def evaluate(self, point: Tensor, penalty: float) -> Evaluation:
        logits = torch.addmm(point[:, -1] + self.offset, self.features, point[:, :-1].T)
        log_p = F.log_softmax(logits, dim=1)
        loss = -(log_p.gather(1, self.labels[:, None])[:, 0].double() @ self.weights.double())
        residual = log_p.exp_()
        residual[torch.arange(len(residual), device=residual.device), self.labels] -= 1
        residual *= self.weights[:, None]
        gradient = torch.cat([residual.T @ self.features, residual.sum(dim=0)[:, None]], dim=1)
        gradient[:, :-1] += penalty * point[:, :-1]
        return loss + penalty / 2 * point[:, :-1].square().sum(dtype=torch.float64), gradient

    def scale(self, point: Tensor, spread: Tensor, penalty: float) -> Tensor:
        """`[d + 1]`: one over the root of the curvature of each coordinate, with that of the softmax averaged over samples and classes."""
        p = F.softmax(torch.addmm(point[:, -1] + self.offset, self.features, point[:, :-1].T), dim=1)
        curvature = self.weights @ (p * (1 - p)).mean(dim=1)
        of_weight = curvature * spread.clamp(min=0) + penalty
        return torch.cat([of_weight, curvature[None].clamp(min=penalty)]).rsqrt()
