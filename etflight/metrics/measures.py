r"""Neural-collapse measures: pure functions of `Moments` and of class vectors, all in float64.

Throughout, `μ_k` is a class mean, `μ_G` the global mean, `M` `[K, d]` the rows `μ_k - μ_G`, `Σ_B = MᵀM/K`, `Σ_W` the pooled
within-class covariance, `w_k` a class vector and `W` `[K, d]` the rows `w_k - w̄`. Papers differ; the axes are arguments with the same
name and default everywhere:

- `global_mean="class"`: `μ_G` is the unweighted mean of class means; `"sample"` weighs classes by their number of samples, which makes even
  a perfect simplex look imperfect under imbalance (Yang et al. 2022, Papyan et al. 2020 on balanced data, where both agree).
- `center_weight=True`: class vectors are centred, since adding one vector to all changes nothing a softmax sees; False is the literature's.
- `center_means=True`: class means are centred.
- `correction=0`: variances divide by n; 1 by n - 1 (standard deviations over classes or pairs always divide by their number).

Classes without samples are left out: K is then the number of classes that have some, and class vectors are restricted and centred likewise.
`summary` counts them. Results are float64 tensors; what is undefined, such as anything over fewer than two classes or the
cosine of a zero vector, is NaN, and nothing is clamped except rounding residues below zero of squares.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from etflight.metrics.statistics import Moments

GlobalMean = Literal["class", "sample"]
Of = Literal["means", "weights", "both"]

__all__ = [
    "agreement",
    "alignment",
    "alignment_std",
    "cdnv",
    "centred_means",
    "class_alignment",
    "cos_cross",
    "cos_cross_std",
    "cos_means",
    "cos_means_std",
    "cos_weights",
    "cos_weights_std",
    "effective_rank",
    "etf_distance",
    "nc1",
    "nc1_per_class",
    "nc1_ratio",
    "nc2_equiangularity",
    "nc2_equinorm",
    "nc3",
    "nc4",
    "nc4_centres",
    "nearest_centre",
    "spectrum",
    "structure_error",
    "summary",
]


# Centring ---------------------------------------------------------------------------------------------------------


def centred_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """The rows `μ_k - μ_G` of the classes that have samples.

    Args:
        stats: of K classes.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        `[K', d]`, K' the number of classes with samples, in class order.
    """
    means = stats.means[_present(stats)].to(torch.float64)
    return means - (_mean_weights(stats, global_mean)[:, None] * means).sum(0)


def _present(stats: Moments) -> Tensor:
    return stats.counts > 0


def _mean_weights(stats: Moments, global_mean: GlobalMean) -> Tensor:
    counts = stats.counts[_present(stats)].to(torch.float64)
    if global_mean == "class":
        return torch.full_like(counts, 1 / max(len(counts), 1))
    if global_mean == "sample":
        return counts / counts.sum()
    raise ValueError(f'global_mean is "class" or "sample", got {global_mean!r}')


def _class_vectors(stats: Moments, weight: Tensor, center_weight: bool) -> Tensor:
    if weight.shape != stats.means.shape:
        raise ValueError(
            f"class vectors must be {list(stats.means.shape)} as the class means, got {list(weight.shape)}"
        )
    vectors = weight.detach().to(stats.means)[_present(stats)]
    return vectors - vectors.mean(0) if center_weight else vectors


def _vectors(
    stats: Moments, weight: Tensor | None, of: Of, global_mean: GlobalMean, center_means: bool, center_weight: bool
) -> list[Tensor]:
    """The means, the class vectors, or both, as `of` says."""
    if of not in ("means", "weights", "both"):
        raise ValueError(f'of is "means", "weights" or "both", got {of!r}')
    chosen = []
    if of != "weights":
        raw = stats.means[_present(stats)].to(torch.float64)
        chosen.append(centred_means(stats, global_mean=global_mean) if center_means else raw)
    if of != "means":
        if weight is None:
            raise ValueError(f'of="{of}" needs the class vectors: pass weight')
        chosen.append(_class_vectors(stats, weight, center_weight))
    return chosen


def _nan(stats: Moments) -> Tensor:
    return stats.means.new_full((), math.nan, dtype=torch.float64)


# NC1: variability -------------------------------------------------------------------------------------------------


class _Between(NamedTuple):
    """`Σ_B = AᵀA/K` with the known null vector of the centred rows taken out, and its triangular factor."""

    reduced: Tensor  # A, [K - 1, d]
    q: Tensor  # orthonormal columns: AᵀA = q r rᵀ qᵀ if K - 1 <= d, else A = q r
    r: Tensor
    singular: Tensor  # of A, descending, 0 where only rounding is left


def _between(stats: Moments, global_mean: GlobalMean) -> _Between:
    rows = _without_null(centred_means(stats, global_mean=global_mean), _mean_weights(stats, global_mean))
    return _factor(rows, stats.means[_present(stats)].norm())


def _without_null(rows: Tensor, null: Tensor) -> Tensor:
    """An orthonormal basis change of `rows` `[K, d]`, with `nullᵀ rows = 0`, that leaves K - 1 rows: a Householder reflection."""
    reflect = null / null.norm()
    reflect[0] += 1
    return (rows - torch.outer(reflect, 2 / reflect.square().sum() * (reflect @ rows)))[1:]


def _factor(reduced: Tensor, scale: Tensor) -> _Between:
    """Factorise; singular values that rounding in rows of norm `scale`, before centring, can explain are set to 0."""
    wide = reduced.shape[0] <= reduced.shape[1]
    q, r = torch.linalg.qr(reduced.T if wide else reduced)
    if not bool(
        r.isfinite().all()
    ):  # a diverged network is to be shown as NaN, not to end its training with a LAPACK error
        return _Between(reduced, q, r, r.new_full((len(r),), math.nan))
    singular = torch.linalg.svdvals(r)
    floor = max(reduced.shape) * torch.finfo(r.dtype).eps * torch.maximum(singular[0], scale)
    return _Between(reduced, q, r, torch.where(singular > floor, singular, 0.0))


def _root_pinv(between: _Between) -> Tensor:
    """`X` with `(AᵀA)⁺ = X Xᵀ`."""
    reduced, q, r, singular = between
    if bool(singular.isnan().any()):
        return torch.full_like(reduced.T, math.nan)
    rank = int(singular.count_nonzero())
    if rank < len(singular):  # coinciding or dependent centres
        _, kept, right = torch.linalg.svd(reduced, full_matrices=False)
        root: Tensor = right[:rank].T / kept[:rank]
        return root
    if reduced.shape[0] <= reduced.shape[1]:
        root = torch.linalg.solve_triangular(r.T, q, upper=False, left=False)
    else:
        root = torch.linalg.solve_triangular(r, torch.eye(len(r), dtype=r.dtype, device=r.device), upper=True)
    return root


def nc1(
    stats: Moments, *, divide_by_classes: bool = True, global_mean: GlobalMean = "class", correction: int = 0
) -> Tensor:
    r"""Within-class variability relative to the between-class one, `tr(Σ_W Σ_B⁺)/K`.

    Solved through a triangular factor of the K - 1 centred means (or, for K - 1 > d, of `Σ_B`), never through a d×d pseudo-inverse.
    Directions in which centres coincide to rounding are left out, as the pseudo-inverse does. Whether `Σ_W` is sample- or
    class-weighted was decided when it was collected (`ClassStatistics(class_counts=…)`).

    Args:
        stats: with the scatter.
        divide_by_classes: False gives Papyan's trace without 1/K.
        global_mean: how classes weigh in `μ_G`.
        correction: 1 makes `Σ_W` the unbiased pooled covariance, divided by N - K.

    Returns:
        Scalar >= 0; 0 under perfect collapse, NaN if all centres coincide.

    Raises:
        ValueError: statistics without scatter; a correction other than 0 for a class-weighted `Σ_W`.

    Source:
        Zhu et al. 2021, arXiv 2105.02375 (with 1/K); Papyan, Han & Donoho 2020 (without, sample-weighted).

    Example:
        >>> from etflight.metrics import ClassStatistics
        >>> statistics = ClassStatistics(num_classes=2, feature_dim=2)
        >>> features = torch.tensor([[0.9, 0.0], [1.1, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
        >>> statistics.update(features, torch.tensor([0, 0, 1, 1]))
        >>> round(nc1(statistics.compute()).item(), 6)
        0.0025
    """
    if stats.within is None:
        raise ValueError("nc1 needs the scatter: collect it with ClassStatistics(scatter=True)")
    if int(_present(stats).sum()) < 2:
        return _nan(stats)
    return _nc1(stats, stats.within, _between(stats, global_mean), divide_by_classes, correction)


def _nc1(stats: Moments, within: Tensor, between: _Between, divide_by_classes: bool, correction: int) -> Tensor:
    root = _root_pinv(between)
    if root.shape[1] == 0:
        return _nan(stats)
    # reshape: torchmetrics squeezes the [1, 1] of d = 1
    trace = ((within.reshape(len(root), len(root)) @ root) * root).sum() * _pooled_correction(stats, correction)
    return trace if divide_by_classes else trace * (between.reduced.shape[0] + 1)


def _pooled_correction(stats: Moments, correction: int) -> float:
    if correction == 0:
        return 1.0
    if stats.class_weighted:
        raise ValueError("a class-weighted scatter cannot be corrected afterwards: use correction=0")
    total, classes = int(stats.counts.sum()), int(_present(stats).sum())
    return total / (total - correction * classes) if total > correction * classes else math.nan


def _variances(stats: Moments, correction: int) -> Tensor:
    """`[K]`, NaN where n <= correction."""
    counts = stats.counts.to(torch.float64)
    if correction == 0:
        return stats.variances
    return torch.where(counts > correction, stats.variances * counts / (counts - correction), torch.nan)


def nc1_per_class(stats: Moments, *, global_mean: GlobalMean = "class", correction: int = 0) -> Tensor:
    """Each class's variance relative to the between-class one, `tr Σ_k / tr Σ_B`; `nc1_ratio` is its mean.

    Args:
        stats: with or without scatter.
        global_mean: how classes weigh in `μ_G`.
        correction: 0 or 1, variances divide by n - correction.

    Returns:
        `[K]`, >= 0; 0 under perfect collapse; NaN for classes with at most `correction` samples, or none.

    Source:
        The traces of Papyan, Han & Donoho 2020, class by class.
    """
    return _variances(stats, correction) / _between_trace(stats, global_mean)


def _between_trace(stats: Moments, global_mean: GlobalMean) -> Tensor:
    return centred_means(stats, global_mean=global_mean).square().sum(1).mean()


def nc1_ratio(
    stats: Moments,
    *,
    weighting: Literal["class", "sample"] = "class",
    divide_by_classes: bool = False,
    global_mean: GlobalMean = "class",
    correction: int = 0,
) -> Tensor:
    """Quotient of traces, `tr Σ_W / tr Σ_B`: NC1 without the inverse, from variances alone.

    Args:
        stats: with or without scatter.
        weighting: whether classes or samples weigh the same in `Σ_W`.
        divide_by_classes: True divides by K.
        global_mean: how classes weigh in `μ_G`.
        correction: 0 or 1, class variances divide by n - correction; classes with no more samples than that are left out.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Source:
        The matrices of Papyan, Han & Donoho 2020.
    """
    kept = stats.counts > correction
    variances = _variances(stats, correction)[kept]
    if weighting == "sample":
        weights = stats.counts[kept].to(torch.float64)
        within = (variances * weights).sum() / weights.sum()
    elif weighting == "class":
        within = variances.mean()
    else:
        raise ValueError(f'weighting is "class" or "sample", got {weighting!r}')
    ratio = within / _between_trace(stats, global_mean)
    return ratio / _present(stats).sum() if divide_by_classes else ratio


def cdnv(stats: Moments, *, exponent: int = 2, correction: int = 0, tile: int = 1024) -> Tensor:
    r"""Class-distance normalised variance, the mean over pairs of classes of `(tr Σ_i + tr Σ_j) / (2 ‖μ_i - μ_j‖^exponent)`.

    Args:
        stats: with or without scatter.
        exponent: 2 as published; 1 divides by the distance instead of its square (then it has the unit of the features).
        correction: 0 or 1, variances divide by n - correction; classes with no more samples than that are left out.
        tile: classes per tile, memory is `O(tile²)`.

    Returns:
        Scalar >= 0; 0 under perfect collapse, infinite if two centres with spread coincide.

    Raises:
        ValueError: another exponent.

    Source:
        Galanti, György & Hutter 2021, arXiv 2112.15121.
    """
    if exponent not in (1, 2):
        raise ValueError(f"exponent is 1 or 2, got {exponent}")
    kept = stats.counts > correction
    variances, means = _variances(stats, correction)[kept], stats.means[kept]
    K = len(means)
    if K < 2:
        return _nan(stats)
    means = means - means.mean(0)
    squares = means.square().sum(1)
    total = means.new_zeros(())
    for i in range(0, K, tile):
        for j in range(i, K, tile):
            left, right = slice(i, i + tile), slice(j, j + tile)
            scale = squares[left, None] + squares[right]
            distances = torch.addmm(scale, means[left], means[right].T, alpha=-2)
            # The subtraction has lost more than six digits for close pairs: take their differences instead.
            close = distances < 1e-6 * scale
            if i == j:
                close.fill_diagonal_(False)
            for pairs in torch.split(close.nonzero(), max(1, 2**22 // means.shape[1])):
                a, b = pairs[:, 0], pairs[:, 1]
                distances[a, b] = (means[left][a] - means[right][b]).square().sum(1)
            if exponent == 1:
                distances = distances.clamp_(min=0).sqrt_()
            terms = (variances[left, None] + variances[right]).div_(distances)
            if i == j:
                total += terms.fill_diagonal_(0.0).sum() / 2
            else:
                total += terms.sum()
    return total / (K * (K - 1))


# NC2: geometry of the means ---------------------------------------------------------------------------------------


class _Cosines(NamedTuple):
    mean: Tensor
    std: Tensor
    deviation: Tensor  # mean |cos + 1/(K - 1)|


def _off_diagonal_cosines(left: Tensor, right: Tensor | None = None, tile: int = 1024) -> _Cosines:
    """Statistics of `cos(left_i, right_j)` over `i != j`, tile by tile; `right` is `left` if not given."""
    symmetric = right is None
    left = left / left.norm(dim=1, keepdim=True)
    right = left if right is None else right / right.norm(dim=1, keepdim=True)
    K = len(left)
    number = 0
    mean, squares, absolute = left.new_zeros(3).unbind()
    for i in range(0, K, tile):
        for j in range(i if symmetric else 0, K, tile):
            shifted = left[i : i + tile] @ right[j : j + tile].T + 1 / (K - 1)
            if i == j:
                n = len(shifted)
                shifted = shifted.flatten()[1:].view(n - 1, n + 1)[:, :-1]  # all but the diagonal
            if shifted.numel() == 0:
                continue
            twice = 2 if symmetric and i != j else 1
            # Chan, Golub & LeVeque's merge of means and squared deviations
            tile_mean = shifted.mean()
            n = twice * shifted.numel()
            step = tile_mean - mean
            squares = (
                squares + twice * (shifted - tile_mean).square_().sum() + step.square() * (number * n / (number + n))
            )
            mean = mean + step * (n / (number + n))
            absolute = absolute + twice * shifted.abs().sum()
            number += n
    if number == 0:
        nan = left.new_full((), math.nan)
        return _Cosines(nan, nan, nan)
    return _Cosines(mean - 1 / (K - 1), (squares / number).sqrt(), absolute / number)


def nc2_equinorm(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
    correction: int = 0,
) -> Tensor:
    """How unequal the norms are: their standard deviation divided by their mean.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.
        correction: 0 or 1, the standard deviation divides by K - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Source:
        Papyan, Han & Donoho 2020, section "Equinorm".
    """
    chosen = _vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return _nan(stats)
    return torch.stack([_variation(vectors.norm(dim=1), correction) for vectors in chosen]).mean()


def _variation(norms: Tensor, correction: int) -> Tensor:
    return norms.std(correction=correction) / norms.mean()


def nc2_equiangularity(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    deviation: Literal["etf", "std"] = "etf",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
    tile: int = 1024,
) -> Tensor:
    """How far the pairwise angles are from those of a simplex ETF: mean of `|cos + 1/(K-1)|` over pairs.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        deviation: "std" gives the standard deviation of the cosines instead, Papyan's equiangularity: it does not ask for -1/(K-1).
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.
        tile: classes per tile, memory is `O(tile²)`.

    Returns:
        Scalar in [0, 1 + 1/(K-1)]; 0 under perfect collapse.

    Source:
        Papyan, Han & Donoho 2020, sections "Equiangularity" (std) and "Maximal-angle equiangularity" (etf).
    """
    if deviation not in ("etf", "std"):
        raise ValueError(f'deviation is "etf" or "std", got {deviation!r}')
    chosen = _vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return _nan(stats)
    cosines = [_off_diagonal_cosines(vectors, tile=tile) for vectors in chosen]
    return torch.stack([c.deviation if deviation == "etf" else c.std for c in cosines]).mean()


def etf_distance(stats: Moments, weight: Tensor | None = None, *, of: Of = "means", squared: bool = True) -> Tensor:
    r"""Distance of the centred class means to the nearest simplex ETF, both scaled to Frobenius norm 1.

    Squared it is `2 - 2 ‖M‖_* / (sqrt(K-1) ‖M‖_F)`, see `etflight.geometry.nearest_etf`; defined also where centres coincide and the
    nearest frame is not unique.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed for `of="weights"` and `"both"`.
        of: class means, class vectors, or the mean of the two results.
        squared: False takes the root.

    Returns:
        Scalar in [0, 2) (squared); 0 under perfect collapse; NaN for K > d + 1, where no simplex ETF exists, or if all
            centres coincide.
    """
    results = []
    for raw in _vectors(stats, weight, of, "class", False, False):
        if len(raw) < 2:
            return _nan(stats)
        rows = _without_null(raw - raw.mean(0), torch.ones_like(raw[:, 0]))
        results.append(_etf_distance(_factor(rows, raw.norm())))
    distance = torch.stack(results).mean()
    return distance if squared else distance.sqrt()


def _etf_distance(between: _Between) -> Tensor:
    rows, d = between.reduced.shape
    if rows > d:
        return between.singular.new_full((), math.nan)
    score = between.singular.sum() / (math.sqrt(rows) * between.singular.norm())
    distance: Tensor = (2 - 2 * score).clamp(min=0)
    return distance


def cos_means(stats: Moments, *, global_mean: GlobalMean = "class", center_means: bool = True) -> Tensor:
    """Mean of `cos(μ_i - μ_G, μ_j - μ_G)` over `i != j`.

    Args:
        stats: with or without scatter.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Source:
        Yang et al. 2022, arXiv 2203.09081, whose curves show it.
    """
    return _pairs(stats, None, "means", global_mean, center_means, True).mean


def cos_means_std(stats: Moments, *, global_mean: GlobalMean = "class", center_means: bool = True) -> Tensor:
    """Standard deviation of what `cos_means` averages; same arguments; 0 under perfect collapse."""
    return _pairs(stats, None, "means", global_mean, center_means, True).std


def cos_weights(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Mean of `cos(w_i - w̄, w_j - w̄)` over `i != j`.

    Args:
        stats: says which classes have samples; the others are left out.
        weight: `[K, d]`, class vectors.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    return _pairs(stats, weight, "weights", "class", True, center_weight).mean


def cos_weights_std(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Standard deviation of what `cos_weights` averages; same arguments; 0 under perfect collapse."""
    return _pairs(stats, weight, "weights", "class", True, center_weight).std


def cos_cross(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Mean of `cos(μ_i - μ_G, w_j - w̄)` over `i != j`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [-1, 1]; -1/(K-1) under perfect collapse.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    return _pairs(stats, weight, "both", global_mean, center_means, center_weight).mean


def cos_cross_std(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Standard deviation of what `cos_cross` averages; same arguments; 0 under perfect collapse."""
    return _pairs(stats, weight, "both", global_mean, center_means, center_weight).std


def _pairs(
    stats: Moments, weight: Tensor | None, of: Of, global_mean: GlobalMean, center_means: bool, center_weight: bool
) -> _Cosines:
    chosen = _vectors(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return _Cosines(_nan(stats), _nan(stats), _nan(stats))
    return _off_diagonal_cosines(chosen[0], chosen[-1] if of == "both" else None)


# NC3: duality with the class vectors ------------------------------------------------------------------------------


def class_alignment(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Each class's `cos(μ_k - μ_G, w_k - w̄)`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        global_mean: how classes weigh in `μ_G`.
        center_means: subtract `μ_G` first.
        center_weight: subtract `w̄` first.

    Returns:
        `[K]` in [-1, 1]; 1 under perfect collapse; NaN for classes without samples.

    Source:
        Yang et al. 2022, arXiv 2203.09081.
    """
    means, vectors = _vectors(stats, weight, "both", global_mean, center_means, center_weight)
    cosines = (means * vectors).sum(1) / (means.norm(dim=1) * vectors.norm(dim=1))
    result = stats.means.new_full(stats.counts.shape, math.nan, dtype=torch.float64)
    result[_present(stats)] = cosines
    return result


def alignment(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Mean of `class_alignment` over the classes that have samples; same arguments.

    Returns:
        Scalar in [-1, 1]; 1 under perfect collapse.
    """
    return _mean_std(
        class_alignment(stats, weight, global_mean=global_mean, center_means=center_means, center_weight=center_weight)[
            _present(stats)
        ]
    )[0]


def alignment_std(
    stats: Moments,
    weight: Tensor,
    *,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """Standard deviation of `class_alignment` over the classes that have samples; same arguments; 0 under perfect collapse."""
    return _mean_std(
        class_alignment(stats, weight, global_mean=global_mean, center_means=center_means, center_weight=center_weight)[
            _present(stats)
        ]
    )[1]


def _mean_std(values: Tensor) -> tuple[Tensor, Tensor]:
    mean = values.mean()
    return mean, (values - mean).square().mean().sqrt()


def nc3(
    stats: Moments,
    weight: Tensor,
    *,
    squared: bool = True,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Self-duality, `‖M/‖M‖_F - W/‖W‖_F‖²_F`.

    `alignment` is the cosine form, `structure_error` that of the product `W Mᵀ`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        squared: False takes the root, Papyan's form.
        global_mean: how classes weigh in `μ_G`.
        center_weight: subtract `w̄` first.

    Returns:
        Scalar in [0, 4] (squared); 0 under perfect collapse.

    Source:
        Papyan, Han & Donoho 2020, section "Self-duality"; squared in Yang et al. 2022.
    """
    means, vectors = _vectors(stats, weight, "both", global_mean, True, center_weight)
    distance: Tensor = (means / means.norm() - vectors / vectors.norm()).norm()
    return distance.square() if squared else distance


def structure_error(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Literal["cross", "means", "weights"] = "cross",
    squared: bool = False,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Distance of a normalised Gram matrix to that of the simplex, `‖G/‖G‖_F - (I - 11ᵀ/K)/sqrt(K-1)‖_F`.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, needed unless `of="means"`.
        of: "cross" for `G = W Mᵀ` (NC3), "weights" for `W Wᵀ` and "means" for `M Mᵀ` (NC2). `[K, K]` is formed.
        squared: True squares it.
        global_mean: how classes weigh in `μ_G`.
        center_weight: subtract `w̄` first; False is the published form.

    Returns:
        Scalar in [0, 2]; 0 under perfect collapse.

    Source:
        Zhu et al. 2021, arXiv 2105.02375 (NC2 and NC3).
    """
    if of == "cross":
        means, vectors = _vectors(stats, weight, "both", global_mean, True, center_weight)
    elif of in ("means", "weights"):
        [vectors] = _vectors(stats, weight, of, global_mean, True, center_weight)
        means = vectors
    else:
        raise ValueError(f'of is "cross", "means" or "weights", got {of!r}')
    K = len(vectors)
    if K < 2:
        return _nan(stats)
    gram = vectors @ means.T
    target = (torch.eye(K, dtype=gram.dtype, device=gram.device) - 1 / K) / math.sqrt(K - 1)
    error: Tensor = (gram / gram.norm() - target).norm()
    return error.square() if squared else error


# NC4: the decision ------------------------------------------------------------------------------------------------


def nearest_centre(features: Tensor, stats: Moments, *, max_entries: int = 2**24) -> Tensor:
    """The class whose mean is nearest, `argmin_k ‖h - μ_k‖`, among classes that have samples.

    Args:
        features: `[B, d]`.
        stats: whose means are the centres.
        max_entries: largest number of distances held at once.

    Returns:
        `[B]` int64.

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    classes = _present(stats).nonzero().squeeze(1)
    if len(classes) == 0:
        raise ValueError("no class has samples: there is no centre")
    origin = stats.means[classes].mean(0)
    centres = stats.means[classes] - origin
    offsets = 0.5 * centres.square().sum(1)
    nearest = []
    for part in torch.split(features.detach(), max(1, max_entries // len(classes))):
        scores = (part.to(centres) - origin) @ centres.T - offsets
        nearest.append(classes[scores.argmax(1)])
    return torch.cat(nearest)


def agreement(decision: Tensor, nearest: Tensor, *, mismatch: bool = False) -> Tensor:
    """Share of samples on which two decisions `[B]` agree (or, with `mismatch`, do not), a scalar in [0, 1]."""
    same = (decision == nearest.to(decision.device)).to(torch.float64).mean()
    return 1 - same if mismatch else same


def nc4(
    features: Tensor,
    stats: Moments,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    use_bias: bool = True,
    mismatch: bool = False,
) -> Tensor:
    """Agreement of the head's decision, `argmax_k ⟨w_k, h⟩ + b_k`, with the nearest class centre.

    For another head, compare its own decision: `agreement(logits.argmax(1), nearest_centre(features, stats))`.

    Args:
        features: `[B, d]`.
        stats: whose means are the centres.
        weight: `[K, d]`, class vectors.
        bias: `[K]`.
        use_bias: False ignores the bias.
        mismatch: True gives the share of disagreement, Papyan's form.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse (0 with `mismatch`).

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    logits = _logits(features, weight, bias if use_bias else None)
    return agreement(logits.argmax(1), nearest_centre(features, stats), mismatch=mismatch)


def nc4_centres(stats: Moments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Share of class means that the head, bias included, assigns to their own class: NC4 on the centres, without a sample.

    Args:
        stats: with or without scatter.
        weight: `[K, d]`, class vectors.
        bias: `[K]`.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse.
    """
    classes = _present(stats).nonzero().squeeze(1)
    return agreement(_logits(stats.means[classes], weight, bias).argmax(1), classes)


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = features.detach().to(torch.float64) @ weight.detach().to(features.device, torch.float64).T
    return logits if bias is None else logits + bias.detach().to(logits)


# Spectra ----------------------------------------------------------------------------------------------------------


def spectrum(stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class") -> Tensor:
    """Singular values of the centred means `M`, or of `Σ_W`.

    Args:
        stats: with the scatter for `of="within"`.
        of: which matrix.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        Descending, >= 0: `[min(K - 1, d)]` for the means, all equal under perfect collapse; `[d]` for `Σ_W`, all 0 then.

    Raises:
        ValueError: `of="within"` on statistics without scatter.
    """
    if of == "within":
        if stats.within is None:
            raise ValueError("the spectrum of Σ_W needs the scatter: collect it with ClassStatistics(scatter=True)")
        d = stats.means.shape[1]
        within = stats.within.reshape(d, d)
        if not bool(within.isfinite().all()):
            return within.new_full((d,), math.nan)
        eigenvalues: Tensor = torch.linalg.eigvalsh(within)
        return eigenvalues.flip(0).clamp(min=0)
    if of != "means":
        raise ValueError(f'of is "means" or "within", got {of!r}')
    if int(_present(stats).sum()) < 2:
        return stats.means.new_empty(0)
    return _between(stats, global_mean).singular


def effective_rank(
    stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class"
) -> Tensor:
    """Exponential of the entropy of the `spectrum`, normalised to sum 1.

    Args:
        stats: with the scatter for `of="within"`.
        of: the centred means, or `Σ_W`.
        global_mean: how classes weigh in `μ_G`.

    Returns:
        Scalar in [1, number of singular values]; K - 1 for the means under perfect collapse; NaN for a zero matrix.

    Source:
        Roy & Vetterli 2007, "The effective rank".
    """
    return _effective_rank(spectrum(stats, of=of, global_mean=global_mean))


def _effective_rank(singular: Tensor) -> Tensor:
    if len(singular) == 0:
        return singular.new_full((), math.nan)
    share = singular / singular.sum()
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()


# All of them ------------------------------------------------------------------------------------------------------


def summary(
    stats: Moments,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    spectra: bool = True,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> dict[str, Tensor]:
    """Every scalar measure under its log name, in the default conventions; shares work between measures.

    Args:
        stats: `nc1` and `effective_rank_within` need the scatter and are left out without.
        weight: `[K, d]`, class vectors; without, the measures that need them are left out.
        bias: `[K]`, of the head.
        spectra: False leaves out `effective_rank` and `effective_rank_within`, whose eigenvalues cost more than all the rest.
        global_mean: how classes weigh in `μ_G`.
        center_weight: subtract `w̄` first.

    Returns:
        Scalars: `nc1`, `nc1_ratio`, `cdnv`, `nc2_equinorm`, `nc2_equiangularity`, `etf_distance`, `cos_means`, `cos_means_std`; with
        class vectors `nc2_equinorm_weights`, `nc2_equiangularity_weights`, `alignment`, `alignment_std`, `nc3`, `nc4_centres`,
        `cos_weights`, `cos_cross` and their `_std`; `effective_rank`, `effective_rank_within`; and the counts `missing_classes` (no
        samples) and `single_sample_classes` (their variance is 0 by necessity, which makes the variability look small).
    """
    result: dict[str, Tensor] = {}
    present = _present(stats)
    enough = int(present.sum()) >= 2
    between = _between(stats, global_mean) if enough else None
    if stats.within is not None:
        result["nc1"] = _nc1(stats, stats.within, between, True, 0) if between else _nan(stats)
    result["nc1_ratio"] = nc1_ratio(stats, global_mean=global_mean) if enough else _nan(stats)
    result["cdnv"] = cdnv(stats)
    result["nc2_equinorm"] = nc2_equinorm(stats, global_mean=global_mean)
    means = _pairs(stats, None, "means", global_mean, True, center_weight)
    result["nc2_equiangularity"] = means.deviation
    # The nearest frame is centred without weights, so only then the factor can be shared.
    result["etf_distance"] = _etf_distance(between) if between and global_mean == "class" else etf_distance(stats)
    result["cos_means"], result["cos_means_std"] = means.mean, means.std
    if weight is not None:
        vectors = _pairs(stats, weight, "weights", global_mean, True, center_weight)
        cross = _pairs(stats, weight, "both", global_mean, True, center_weight)
        result["nc2_equinorm_weights"] = nc2_equinorm(stats, weight, of="weights", center_weight=center_weight)
        result["nc2_equiangularity_weights"] = vectors.deviation
        aligned = class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[present]
        result["alignment"], result["alignment_std"] = _mean_std(aligned)
        result["nc3"] = nc3(stats, weight, global_mean=global_mean, center_weight=center_weight)
        result["nc4_centres"] = nc4_centres(stats, weight, bias)
        result["cos_weights"], result["cos_weights_std"] = vectors.mean, vectors.std
        result["cos_cross"], result["cos_cross_std"] = cross.mean, cross.std
    if spectra:
        result["effective_rank"] = _effective_rank(between.singular) if between else _nan(stats)
        if stats.within is not None:
            result["effective_rank_within"] = effective_rank(stats, of="within")
    result["missing_classes"] = (stats.counts == 0).sum().to(torch.float64)
    result["single_sample_classes"] = (stats.counts == 1).sum().to(torch.float64)
    return result
