"""One-pass, mergeable class statistics from which every neural-collapse measure follows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from etflight.utils.errors import UserError
from etflight.utils.precision import no_autocast
from etflight.utils.torchmetrics_private import ExactMetric


class Moments(NamedTuple):
    """Class statistics of one set of features, all on the metric's device.

    Attributes:
        counts: The number of samples per class, `[K]` int64.
        means: The class means, `[K, d]` float64; rows of classes without samples are NaN.
        variances: The mean squared distance of a class's samples to their mean, `tr Σ_k` (divided by n, not n - 1), `[K]` float64. It is
            0 for a class with one sample and NaN without samples; a negative rounding residue is set to 0.
        within: The pooled within-class covariance `Σ_W`, `[d, d]` float64: `(1/N) Σ_i (h_i - μ_y)(h_i - μ_y)ᵀ`, or if `class_weighted`
            the same with weights `1/n_y`, scaled to sum to one. None if the scatter was not collected.
        class_weighted: Whether every class weighs the same in `within`, whatever its number of samples.
    """

    counts: Tensor
    means: Tensor
    variances: Tensor
    within: Tensor | None
    class_weighted: bool

    def covariance(self) -> Tensor:
        """Return `within`, `[d, d]`.

        Raises:
            ValueError: The scatter was not collected.
        """
        if self.within is None:
            raise ValueError("this measure needs the scatter: collect it with ClassStatistics(scatter=True)")
        d = self.means.shape[1]
        return self.within.reshape(d, d)  # torchmetrics squeezes the [1, 1] of d = 1

    def to(self, device: torch.device | str) -> "Moments":
        """Return the same statistics on another device."""
        return Moments._make(part.to(device) if isinstance(part, Tensor) else part for part in self)


class ClassStatistics(ExactMetric):
    r"""Counts, means, variances and within-class scatter of labelled features, in one pass and without cancellation.

    Each class has an anchor `a_k`, its first sample or, after `set_anchors`, its mean of the last epoch. The states are sums of
    differences to the anchors, as small as the classes are tight: `n_k`, `s_k = Σ (h - a_k)`, `q_k = Σ ‖h - a_k‖²` and
    `Q = Σ (h - a_y)(h - a_y)ᵀ`. With `δ = s/n` the mean is `a + δ` and `Σ_W = (Q - Σ n_k δ_k δ_kᵀ)/N`. NC1 of float32
    features is right to 1e-7 (1e-5 with `scatter_dtype=torch.float32`) down to 1e-13, where a raw `HᵀH` has no digit left.

    States with different anchors add after moving one to the anchors of the other, `D = a - a'`: `s' = s + nD`,
    `Q' = Q + sᵀD + Dᵀs + Dᵀdiag(n)D`, `q' = q + 2⟨s, D⟩ + n‖D‖²`. Ranks first agree on the common class means as anchors, then
    all-reduce the sums: memory and traffic do not grow with the number of ranks. `dist_sync_fn` is not used.

    `update` does not wait for the device, records no gradient and ignores autocast, TF32 and other reduced float32 matrix products.
    Casting a module that holds the metric (`.half()`, `.to(torch.bfloat16)`) moves the states but keeps their precision.

    Args:
        num_classes: The number of classes K >= 2.
        feature_dim: The width d >= 1 of the features.
        scatter: Whether to collect `Q` (`[d, d]`), which NC1 and the spectrum of `Σ_W` need; without it `Moments.within` is None.
        scatter_dtype: The precision of `Q` and of the class sums `s`, float64 or float32; counts and `q` are always float64.
        class_counts: The number of samples per class that the pass will see, `[K]`. If given, `Σ_W` is class-weighted: a sample of class
            y weighs `1/n_y` instead of 1, relative to the sum of weights. They must be known beforehand: one pass cannot re-weight a
            pooled scatter.
        kwargs: Arguments of `torchmetrics.Metric`.

    Raises:
        ValueError: Sizes, dtype or class counts are invalid. In `update`: the features are not floating `[B, d]`, or the labels are not
            integer `[B]`. In `compute`: labels lie outside `[0, K)`, and the message has their number (`update` only counts them, because
            a check would wait for the device), or there are samples of a class whose given count is zero.

    Source:
        Youngs & Cramer 1971 and Chan, Golub & LeVeque 1983 for shifted one-pass variances and their merging.

    Example:
        >>> statistics = ClassStatistics(num_classes=2, feature_dim=2)
        >>> statistics.update(torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 5.0]]), torch.tensor([0, 0, 1]))
        >>> moments = statistics.compute()
        >>> moments.counts.tolist(), moments.means.tolist(), moments.variances.tolist()
        ([2, 1], [[1.0, 1.0], [5.0, 5.0]], [1.0, 0.0])
    """

    is_differentiable = False

    # Row K of every per-class state is for samples with labels outside [0, K); of it only the count is ever read.
    anchor: Tensor  # [K + 1, d] float32: an anchor need not be exact, only close, and differences to it are exact
    anchored: Tensor  # [K + 1] bool
    count: Tensor  # [K + 1] float64
    shift: Tensor  # [K + 1, d], s
    square: Tensor  # [K + 1] float64, q
    outer: Tensor  # [d, d], Q; only its upper triangle is meant
    class_weight: Tensor  # [K + 1] float64

    def __init__(
        self,
        num_classes: int,
        feature_dim: int,
        *,
        scatter: bool = True,
        scatter_dtype: torch.dtype = torch.float64,
        class_counts: Tensor | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if num_classes < 2 or feature_dim < 1:
            raise ValueError(f"needs num_classes >= 2 and feature_dim >= 1, got {num_classes} and {feature_dim}")
        if scatter_dtype not in (torch.float64, torch.float32):
            raise ValueError(f"scatter_dtype is torch.float64 or torch.float32, got {scatter_dtype}")
        self.num_classes = num_classes
        self.feature_dim = feature_dim
        self.scatter = scatter
        self.scatter_dtype = scatter_dtype
        rows = num_classes + 1
        self.add_sum("anchor", rows, feature_dim, dtype=torch.float32, reduction=None)
        self.add_sum("anchored", rows, dtype=torch.bool, reduction=None)
        self.add_sum("count", rows, dtype=torch.float64)
        self.add_sum("shift", rows, feature_dim, dtype=scatter_dtype)
        self.add_sum("square", rows, dtype=torch.float64)
        if scatter:
            self.add_sum("outer", feature_dim, feature_dim, dtype=scatter_dtype)
        self.class_weighted = class_counts is not None
        weights = torch.ones(rows, dtype=torch.float64)
        if class_counts is not None:
            counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
            if counts.shape != (num_classes,) or not bool((counts >= 0).all() and counts.any()):
                raise ValueError(f"class_counts must be {num_classes} non-negative numbers, not all zero")
            weights[:num_classes] = torch.where(counts > 0, counts.mean() / counts, 0.0)
        # a state, so that a `MetricCollection` does not take metrics with other weights for the same one
        self.add_state("class_weight", weights, dist_reduce_fx=None)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            features: The features `[B, d]`, any floating dtype.
            labels: The class indices `[B]`, any integer dtype, in `[0, K)`.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim or not features.is_floating_point():
            raise ValueError(f"features must be floating [B, {self.feature_dim}], got {_describe(features)}")
        if labels.shape != features.shape[:1] or labels.dtype not in INTEGERS:
            raise ValueError(f"labels must be integer [{features.shape[0]}], got {_describe(labels)}")
        self._copy_shared_states()
        features = features.detach()
        # -1 % (K + 1) is K, so every label outside [0, K) goes to the spare row.
        rows = labels.long().clamp(-1, self.num_classes).remainder(self.num_classes + 1)
        # A sample of a class that already has an anchor is written to the spare row: a mask would wait for the device.
        known = self.anchored.index_select(0, rows)
        self.anchor.index_copy_(0, rows.masked_fill(known, self.num_classes), features.to(torch.float32))
        self.anchored.index_fill_(0, rows, True)
        work = torch.promote_types(features.dtype, self.scatter_dtype)
        difference = self.anchor.index_select(0, rows).to(work)
        difference = torch.sub(features.to(work), difference, out=difference).to(self.scatter_dtype)
        self.shift.index_add_(0, rows, difference)
        squares = torch.linalg.vector_norm(difference, dim=1).to(torch.float64).square_()
        self.square.index_add_(0, rows, squares)
        self.count.index_add_(0, rows, squares.new_ones(()).expand_as(squares))
        if self.scatter:
            if self.class_weighted:
                root = self.class_weight.index_select(0, rows).sqrt_().to(self.scatter_dtype)
                difference = difference * root[:, None]
            # Only blocks that meet the upper triangle: 5/8 of the products. `compute` mirrors it.
            width = max(128, -(-self.feature_dim // 4))
            with no_autocast(features.device), _full_float32(difference):
                for start in range(0, self.feature_dim, width):
                    block = self.outer[start : start + width, start:]
                    block.addmm_(difference[:, start : start + width].T, difference[:, start:])

    @torch.no_grad()
    def compute(self) -> Moments:
        """Return the statistics of all samples over all ranks.

        Returns:
            Moments; its docstring has the shapes and the values for classes without samples.

        Raises:
            ValueError: Labels outside `[0, K)` were seen, or samples of a class whose given count is zero.
        """
        K = self.num_classes
        with no_autocast(self.count.device):
            outside = int(self.count[K])
            if outside:
                raise UserError(f"{outside} labels lie outside [0, {K}): is num_classes right?")
            count, anchored = self.count[:K], self.count[:K] > 0
            weight = self.class_weight[:K]
            if bool((anchored & (weight == 0)).any()):
                raise UserError("there are samples of a class that is empty according to class_counts")
            delta = self.shift[:K].to(torch.float64) / count.clamp(min=1)[:, None]
            variances = (self.square[:K] / count - delta.square().sum(1)).clamp(min=0)  # 0/0 is NaN, as promised
            within = None
            if self.scatter:
                weighted = weight * count
                within = self.outer.to(torch.float64) - (weighted[:, None] * delta).T @ delta
                within = (within.triu() + within.triu(1).T) / weighted.sum()
            means = torch.where(anchored[:, None], self.anchor[:K] + delta, torch.nan)
        return Moments(count.to(torch.int64), means, variances, within, self.class_weighted)

    @torch.no_grad()
    def set_anchors(self, means: Tensor) -> None:
        """Replace the anchors, for instance by the class means of the last epoch.

        The statistics stay exactly equivalent, and are more precise if the new anchors are closer to the samples to come. It may be called
        at any time, usually after `reset`, on every rank or only on some. A row that is not finite, such as that of a class without samples
        in `Moments.means`, leaves its class unchanged.

        Args:
            means: The new anchors `[K, d]`.
        """
        self._copy_shared_states()
        spare = self.anchor[self.num_classes :]
        anchors = torch.cat([means.detach().to(spare), spare])
        self._set_anchors_where(anchors, torch.isfinite(anchors).all(1))

    def _set_anchors_where(self, anchors: Tensor, valid: Tensor) -> None:
        """Use the new `anchors` of the `valid` classes, and change the sums accordingly."""
        anchors = torch.where(valid[:, None], anchors, self.anchor)
        moved = self._states_at_anchors(self.metric_state, anchors)
        for name, value in moved.items():
            setattr(self, name, value)
        self.anchor = anchors
        self.anchored = self.anchored | valid

    def _states_at_anchors(self, state: dict[str, Any], anchors: Tensor) -> dict[str, Tensor]:
        """Compute the sums of `state` about `anchors` instead of its own anchors."""
        dtype = self.scatter_dtype
        with no_autocast(anchors.device):
            D = torch.where(state["anchored"][:, None], state["anchor"].to(dtype) - anchors.to(dtype), 0.0)
            nD = state["count"].to(dtype)[:, None] * D
            half = state["shift"] + 0.5 * nD
            moved = {
                "shift": state["shift"] + nD,
                "square": state["square"] + 2 * (half * D).sum(1, dtype=torch.float64),
            }
            if self.scatter:
                if self.class_weighted:
                    half = half * self.class_weight.to(dtype)[:, None]
                with _full_float32(D):
                    cross = half.T @ D
                moved["outer"] = state["outer"] + cross + cross.T
        return moved

    @torch.no_grad()
    def add_states(self, incoming: dict[str, Any]) -> None:
        """Add the states of another instance, whatever its anchors."""
        incoming = {name: incoming[name].to(self.device) for name in self.metric_state}
        self._set_anchors_where(incoming["anchor"], incoming["anchored"] & ~self.anchored)
        self.count = self.count + incoming["count"]
        for name, value in self._states_at_anchors(incoming, self.anchor).items():
            setattr(self, name, getattr(self, name) + value)

    def merge_state(self, incoming_state: "dict[str, Any] | Metric") -> None:
        """Add the samples that another instance has seen; see `torchmetrics.Metric.merge_state`.

        Raises:
            ValueError: The other instance weighs classes differently.
        """
        if isinstance(incoming_state, ClassStatistics):
            theirs = incoming_state.class_weight.to(self.device)
            if not torch.equal(self.class_weight, theirs):
                raise ValueError("statistics with different class_counts cannot be added")
        super().merge_state(incoming_state)

    @torch.no_grad()
    def sum_over_processes(self, group: Any) -> None:
        """Replace the states by their sum over the processes, using only all-reduces."""
        total = self.count.clone()
        dist.all_reduce(total, group=group)
        # The common anchors are the class means over all ranks, to which every rank adds its part.
        share = (self.count / total.clamp(min=1)).to(self.scatter_dtype)[:, None]
        anchors = self.shift / total.clamp(min=1).to(self.scatter_dtype)[:, None]
        anchors += share * self.anchor
        dist.all_reduce(anchors, group=group)
        self._set_anchors_where(anchors.to(torch.float32), total > 0)
        del anchors
        self.count = total
        for name in ("shift", "square", "outer") if self.scatter else ("shift", "square"):
            state = getattr(self, name).contiguous()
            dist.all_reduce(state, group=group)
            setattr(self, name, state)

    def _copy_shared_states(self) -> None:
        """Copy states that were made under `torch.inference_mode`, because outside of it they refuse in-place updates."""
        if self.count.is_inference() and not torch.is_inference_mode_enabled():
            for name in self.metric_state:
                setattr(self, name, getattr(self, name).clone())


INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


@contextmanager
def _full_float32(operand: Tensor) -> Iterator[None]:
    """Switch off TF32 and bfloat16 matrix products of float32 operands within the block, on GPU and CPU."""
    if operand.dtype != torch.float32:
        yield
        return
    backends: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
