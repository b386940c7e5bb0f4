r"""Neural-collapse measures: pure functions of `Moments` and of class vectors, all in float64.

Throughout, `μ_k` is a class mean, `μ_G` the global mean, `M` `[K, d]` the rows `μ_k - μ_G`, `Σ_B = MᵀM/K`, `Σ_W` the pooled
within-class covariance, `w_k` a class vector and `W` `[K, d]` the rows `w_k - w̄`. Papers differ in their conventions; these arguments
choose them, with the same meaning and default everywhere:

- `stats`: class statistics of K classes; `nc1` and the spectrum of `Σ_W` need the scatter.
- `weight`: the head's class vectors `[K, d]`, and `bias` its biases `[K]`.
- `of="means"`: measure class means, class vectors (`"weights"`), or the mean of both results (`"both"`).
- `global_mean="class"`: `μ_G` is the unweighted mean of class means; `"sample"` weighs classes by their number of samples, which makes even
  a perfect simplex look imperfect under imbalance (Yang et al. 2022, Papyan et al. 2020 on balanced data, where both agree).
- `center_weight=True`: class vectors are centred, because a softmax does not change if one vector is added to all of them; the literature
  does not centre them (False).
- `center_means=True`: class means are centred.
- `correction=0`: variances divide by n; 1 by n - 1. Classes with no more samples than that are left out. Standard deviations over
  classes or pairs always divide by their number.

Classes without samples are left out: K is then the number of classes that have some, and class vectors are restricted and centred likewise.
`summary` counts the classes left out. Results are float64 tensors. An undefined result, such as anything over fewer than two classes or the
cosine of a zero vector, is NaN; nothing is clamped except rounding residues of squares below zero. A ValueError is raised for arguments
without a meaning, for class vectors that are missing or of another shape than the class means, and for a missing scatter.
"""

import math
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from etflight.metrics.statistics import Moments
from etflight.utils.precision import in_float64

GlobalMean = Literal["class", "sample"]
Of = Literal["means", "weights", "both"]

_TILE = 1024  # the number of classes whose pairs are held at once
_MOST_DISTANCES = 2**24  # the number of distances that are held at once


def summary(
    stats: Moments, weight: Tensor | None = None, bias: Tensor | None = None, *, spectra: bool = True
) -> dict[str, Tensor]:
    """Every scalar measure under its log name, in the default conventions; shares work between measures.

    Args:
        stats: The class statistics; without the scatter, `nc1` and `effective_rank_within` are left out.
        weight: The class vectors `[K, d]`; without them, the measures that need them are left out.
        bias: The biases `[K]` of the head.
        spectra: False leaves out `effective_rank` and `effective_rank_within`, whose eigenvalues cost more than all the rest.

    Returns:
        Scalars: `nc1`, `nc1_ratio`, `cdnv`, `nc2_equinorm`, `nc2_equiangularity`, `etf_distance`, `cos_means`, `cos_means_std`; with
        class vectors `nc2_equinorm_weights`, `nc2_equiangularity_weights`, `alignment`, `alignment_std`, `nc3`, `nc4_centres`,
        `cos_weights`, `cos_cross` and their `_std`; `effective_rank`, `effective_rank_within`; and the counts `missing_classes` (no
        samples) and `single_sample_classes` (their variance is 0 by necessity, which makes the variability look small).
    """
    result: dict[str, Tensor] = {}
    factor = _factor(stats, "class")
    if stats.within is not None:
        result["nc1"] = _nc1(stats, factor, True, 0)
    result["nc1_ratio"] = nc1_ratio(stats)
    result["cdnv"] = cdnv(stats)
    result["nc2_equinorm"] = nc2_equinorm(stats)
    means = _cosines(centred_means(stats))
    result["nc2_equiangularity"] = means.deviation
    result["etf_distance"] = _etf_distance(factor)
    result["cos_means"], result["cos_means_std"] = means.mean, means.std
    if weight is not None:
        vectors = _class_vectors(stats, weight, True)
        weights, cross = _cosines(vectors), _cosines(centred_means(stats), vectors)
        result["nc2_equinorm_weights"] = nc2_equinorm(stats, weight, of="weights")
        result["nc2_equiangularity_weights"] = weights.deviation
        result["alignment"], result["alignment_std"] = alignment(stats, weight), alignment_std(stats, weight)
        result["nc3"] = nc3(stats, weight)
        result["nc4_centres"] = nc4_centres(stats, weight, bias)
        result["cos_weights"], result["cos_weights_std"] = weights.mean, weights.std
        result["cos_cross"], result["cos_cross_std"] = cross.mean, cross.std
    if spectra:
        result["effective_rank"] = effective_rank_of_values(factor.singular)
        if stats.within is not None:
            result["effective_rank_within"] = effective_rank(stats, of="within")
    result["missing_classes"] = (stats.counts == 0).sum().to(torch.float64)
    result["single_sample_classes"] = (stats.counts == 1).sum().to(torch.float64)
    return result


# The vectors that are compared -------------------------------------------------------------------------------------


def centred_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """The rows `μ_k - μ_G` of the classes that have samples, in class order: `[K', d]`, K' their number."""
    present = _present(stats)
    means = stats.means[present]
    if global_mean == "class":
        return means - means.mean(0)
    if global_mean == "sample":
        counts = stats.counts[present].to(means)
        return means - (counts[:, None] * means).sum(0) / counts.sum()
    raise ValueError(f'global_mean is "class" or "sample", got {global_mean!r}')


def _present(stats: Moments) -> Tensor:
    """`[K]` bool: the classes that have samples."""
    return stats.counts > 0


def _class_vectors(stats: Moments, weight: Tensor, center_weight: bool) -> Tensor:
    """The class vectors of the classes that have samples, float64 `[K', d]`."""
    if weight.shape != stats.means.shape:
        raise ValueError(
            f"class vectors must be {list(stats.means.shape)} as the class means, got {list(weight.shape)}"
        )
    vectors = in_float64(weight.detach()).to(stats.means)[_present(stats)]
    return vectors - vectors.mean(0) if center_weight else vectors


def _chosen(
    stats: Moments,
    weight: Tensor | None,
    of: Of,
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> list[Tensor]:
    """Return the means, the class vectors, or both in this order, each float64 `[K', d]`."""
    if of not in ("means", "weights", "both"):
        raise ValueError(f'of is "means", "weights" or "both", got {of!r}')
    chosen = []
    if of != "weights":
        chosen.append(centred_means(stats, global_mean=global_mean) if center_means else stats.means[_present(stats)])
    if of != "means":
        if weight is None:
            raise ValueError(f'of="{of}" needs the class vectors: pass weight')
        chosen.append(_class_vectors(stats, weight, center_weight))
    return chosen


def _undefined(stats: Moments) -> Tensor:
    """Return a scalar NaN on the device of the statistics."""
    return stats.means.new_full((), math.nan)


def _std(values: Tensor) -> Tensor:
    """The standard deviation of values `[n]`, a scalar: 0 for one value, NaN for none."""
    return (values - values.mean()).square().mean().sqrt()


class _Factor(NamedTuple):
    """The singular values of K centred rows, descending, with rounding residues set to 0, and their right vectors as rows."""

    singular: Tensor  # [min(K - 1, d)]
    right: Tensor  # [min(K - 1, d), d]
    classes: int  # K


def _factor(stats: Moments, global_mean: GlobalMean) -> _Factor:
    return _decomposed(centred_means(stats, global_mean=global_mean), stats.means[_present(stats)])


def _decomposed(rows: Tensor, raw: Tensor) -> _Factor:
    """Decompose centred `rows` `[K, d]`, at most K - 1 of which are independent.

    Singular values that can be explained by rounding in the `raw` rows, before centring, are set to 0.
    """
    classes, d = rows.shape
    number = max(min(classes - 1, d), 0)
    if not bool(rows.isfinite().all()):
        # a diverged network must appear as NaN, not end its training with a LAPACK error
        return _Factor(rows.new_full((number,), math.nan), rows.new_full((number, d), math.nan), classes)
    _, singular, right = torch.linalg.svd(rows, full_matrices=False)
    floor = max(rows.shape) * torch.finfo(rows.dtype).eps * raw.norm()
    return _Factor(torch.where(singular > floor, singular, 0.0)[:number], right[:number], classes)


# NC1: how much the samples of a class vary, relative to the distance between classes ---------------------------------


def nc1(
    stats: Moments, *, divide_by_classes: bool = True, global_mean: GlobalMean = "class", correction: int = 0
) -> Tensor:
    r"""Within-class variability relative to the between-class one, `tr(Σ_W Σ_B⁺)/K`.

    It is solved through the singular vectors of the centred means, never through a d×d pseudo-inverse. Directions in which centres coincide
    up to rounding are left out, as in the pseudo-inverse. Whether `Σ_W` is sample- or class-weighted was decided when it was collected
    (`ClassStatistics(class_counts=…)`); a class-weighted one cannot be corrected.

    Args:
        stats: The class statistics, with the scatter.
        divide_by_classes: False gives Papyan's trace without 1/K.
        global_mean: How classes weigh in `μ_G`.
        correction: 1 makes `Σ_W` the unbiased pooled covariance, divided by N - K.

    Returns:
        Scalar >= 0; 0 under perfect collapse, NaN if all centres coincide.

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
    return _nc1(stats, _factor(stats, global_mean), divide_by_classes, correction)


def _nc1(stats: Moments, factor: _Factor, divide_by_classes: bool, correction: int) -> Tensor:
    within, rank = stats.covariance(), int(factor.singular.count_nonzero())
    if rank == 0:
        return _undefined(stats)
    root = factor.right[:rank].T / factor.singular[:rank]  # (MᵀM)⁺ is root rootᵀ
    trace = ((within @ root) * root).sum() * _pooled_correction(stats, factor.classes, correction)
    return trace if divide_by_classes else trace * factor.classes


def _pooled_correction(stats: Moments, classes: int, correction: int) -> float:
    if correction == 0:
        return 1.0
    if stats.class_weighted:
        raise ValueError("a class-weighted scatter cannot be corrected afterwards: use correction=0")
    total, degrees = int(stats.counts.sum()), int(stats.counts.sum()) - correction * classes
    return total / degrees if degrees > 0 else math.nan


def nc1_per_class(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Each class's variance relative to the between-class one, `tr Σ_k / tr Σ_B`; `nc1_ratio` is its mean.

    `[K]`, >= 0; 0 under perfect collapse; NaN for classes without samples. The traces of Papyan, Han & Donoho 2020, class by class.
    """
    return stats.variances / _between_trace(stats, global_mean)


def _between_trace(stats: Moments, global_mean: GlobalMean) -> Tensor:
    rows = centred_means(stats, global_mean=global_mean)
    return rows.square().sum(1).mean() if len(rows) > 1 else _undefined(stats)


def nc1_ratio(
    stats: Moments,
    *,
    weighting: Literal["class", "sample"] = "class",
    global_mean: GlobalMean = "class",
    correction: int = 0,
) -> Tensor:
    """Quotient of traces, `tr Σ_W / tr Σ_B`: NC1 without the inverse, from variances alone.

    Args:
        stats: The class statistics, with or without scatter.
        weighting: Whether classes or samples weigh the same in `Σ_W`.
        global_mean: How classes weigh in `μ_G`.
        correction: 0 or 1; class variances divide by n - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse.

    Source:
        The matrices of Papyan, Han & Donoho 2020.
    """
    kept, variances = _variances(stats, correction)
    if weighting == "sample":
        weights = stats.counts[kept].to(variances)
        within = (variances * weights).sum() / weights.sum()
    elif weighting == "class":
        within = variances.mean()
    else:
        raise ValueError(f'weighting is "class" or "sample", got {weighting!r}')
    return within / _between_trace(stats, global_mean)


def _variances(stats: Moments, correction: int) -> tuple[Tensor, Tensor]:
    """Return which classes have more samples than the correction, `[K]` bool, and the variances of these classes."""
    kept = stats.counts > correction
    counts = stats.counts[kept].to(stats.variances)
    return kept, stats.variances[kept] * (counts / (counts - correction))


def cdnv(stats: Moments, *, exponent: int = 2, correction: int = 0) -> Tensor:
    r"""Class-distance normalised variance, the mean over pairs of classes of `(tr Σ_i + tr Σ_j) / (2 ‖μ_i - μ_j‖^exponent)`.

    Args:
        stats: The class statistics, with or without scatter.
        exponent: 2 as published; 1 divides by the distance instead of its square (then it has the unit of the features).
        correction: 0 or 1; variances divide by n - correction.

    Returns:
        Scalar >= 0; 0 under perfect collapse, infinite if two centres with spread coincide.

    Source:
        Galanti, György & Hutter 2021, arXiv 2112.15121.
    """
    if exponent not in (1, 2):
        raise ValueError(f"exponent is 1 or 2, got {exponent}")
    kept, variances = _variances(stats, correction)
    means = stats.means[kept]
    K = len(means)
    if K < 2:
        return _undefined(stats)
    means = means - means.mean(0)
    squares = means.square().sum(1)
    total = means.new_zeros(())
    for i in range(0, K, _TILE):
        for j in range(i, K, _TILE):
            left, right = slice(i, i + _TILE), slice(j, j + _TILE)
            scale = squares[left, None] + squares[right]
            distances = torch.addmm(scale, means[left], means[right].T, alpha=-2)
            # For close pairs the subtraction has lost more than six digits, so their differences are taken instead.
            close = distances < 1e-6 * scale
            if i == j:
                close.fill_diagonal_(False)
            for pairs in torch.split(close.nonzero(), max(1, 2**22 // means.shape[1])):
                a, b = pairs[:, 0], pairs[:, 1]
                distances[a, b] = (means[left][a] - means[right][b]).square().sum(1)
            if exponent == 1:
                distances = distances.clamp_(min=0).sqrt_()
            terms = (variances[left, None] + variances[right]).div_(distances)
            total += terms.fill_diagonal_(0.0).sum() / 2 if i == j else terms.sum()
    return total / (K * (K - 1))


# NC2: how far class means, or class vectors, are from a simplex ETF --------------------------------------------------


class _Cosines(NamedTuple):
    """Mean and standard deviation of cosines, and the mean of their distance to -1/(K - 1): scalars."""

    mean: Tensor
    std: Tensor
    deviation: Tensor


def _cosines(left: Tensor, right: Tensor | None = None) -> _Cosines:
    """Statistics of `cos(left_i, right_j)` over `i != j`, for `[K, d]` each; `right` is `left` by default. Memory is `O(_TILE²)`."""
    K, symmetric = len(left), right is None
    if K < 2:
        nan = left.new_full((), math.nan)
        return _Cosines(nan, nan, nan)
    left = left / left.norm(dim=1, keepdim=True)
    right = left if right is None else right / right.norm(dim=1, keepdim=True)
    number = 0
    mean, squares, absolute = left.new_zeros(3).unbind()
    for i in range(0, K, _TILE):
        for j in range(i if symmetric else 0, K, _TILE):
            shifted = left[i : i + _TILE] @ right[j : j + _TILE].T + 1 / (K - 1)
            if i == j:
                n = len(shifted)
                shifted = shifted.flatten()[1:].view(n - 1, n + 1)[:, :-1]  # all but the diagonal
            if shifted.numel() == 0:
                continue
            twice = 2 if symmetric and i != j else 1
            # Chan, Golub & LeVeque's merge of means and squared deviations
            n, tile_mean = twice * shifted.numel(), shifted.mean()
            step = tile_mean - mean
            spread = twice * (shifted - tile_mean).square_().sum()
            squares = squares + spread + step.square() * (number * n / (number + n))
            mean = mean + step * (n / (number + n))
            absolute = absolute + twice * shifted.abs().sum()
            number += n
    return _Cosines(mean - 1 / (K - 1), (squares / number).sqrt(), absolute / number)


def nc2_equinorm(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """How unequal the norms are: their standard deviation divided by their mean.

    Scalar >= 0; 0 under perfect collapse. From Papyan, Han & Donoho 2020, section "Equinorm".
    """
    chosen = _chosen(stats, weight, of, global_mean, center_means, center_weight)
    if len(chosen[0]) < 2:
        return _undefined(stats)
    norms = [vectors.norm(dim=1) for vectors in chosen]
    return torch.stack([_std(n) / n.mean() for n in norms]).mean()


def nc2_equiangularity(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Of = "means",
    deviation: Literal["etf", "std"] = "etf",
    global_mean: GlobalMean = "class",
    center_means: bool = True,
    center_weight: bool = True,
) -> Tensor:
    """How far the pairwise angles are from those of a simplex ETF: mean of `|cos + 1/(K-1)|` over pairs.

    With `deviation="std"` it is the standard deviation of the cosines instead, Papyan's equiangularity, which does not depend on -1/(K-1).

    Scalar in [0, 1 + 1/(K-1)]; 0 under perfect collapse. From Papyan, Han & Donoho 2020, sections "Equiangularity" (std) and
    "Maximal-angle equiangularity" (etf).
    """
    if deviation not in ("etf", "std"):
        raise ValueError(f'deviation is "etf" or "std", got {deviation!r}')
    found = [_cosines(rows) for rows in _chosen(stats, weight, of, global_mean, center_means, center_weight)]
    return torch.stack([c.deviation if deviation == "etf" else c.std for c in found]).mean()


def etf_distance(stats: Moments, weight: Tensor | None = None, *, of: Of = "means") -> Tensor:
    r"""Squared distance of the centred class means to the nearest simplex ETF, both scaled to Frobenius norm 1.

    It is `2 - 2 ‖M‖_* / (sqrt(K-1) ‖M‖_F)`, see `etflight.geometry.nearest_etf`; it is also defined if centres coincide and the nearest
    frame is not unique. An orthogonal Procrustes problem (Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem").

    Scalar in [0, 2); 0 under perfect collapse; NaN for K > d + 1, where no simplex ETF exists, or if all centres coincide.
    """
    rows = _chosen(stats, weight, of, center_means=False, center_weight=False)
    return torch.stack([_etf_distance(_decomposed(raw - raw.mean(0), raw)) for raw in rows]).mean()


def _etf_distance(factor: _Factor) -> Tensor:
    singular, _, classes = factor
    if len(singular) < classes - 1:
        return singular.new_full((), math.nan)
    score = singular.sum() / (math.sqrt(len(singular)) * singular.norm())
    distance: Tensor = (2 - 2 * score).clamp(min=0)
    return distance


def cos_means(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Mean of `cos(μ_i - μ_G, μ_j - μ_G)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return _cosines(centred_means(stats, global_mean=global_mean)).mean


def cos_means_std(stats: Moments, *, global_mean: GlobalMean = "class") -> Tensor:
    """Standard deviation of the cosines that `cos_means` averages: 0 under perfect collapse."""
    return _cosines(centred_means(stats, global_mean=global_mean)).std


def cos_weights(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Mean of `cos(w_i - w̄, w_j - w̄)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return _cosines(_class_vectors(stats, weight, center_weight)).mean


def cos_weights_std(stats: Moments, weight: Tensor, *, center_weight: bool = True) -> Tensor:
    """Standard deviation of the cosines that `cos_weights` averages: 0 under perfect collapse."""
    return _cosines(_class_vectors(stats, weight, center_weight)).std


def cos_cross(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Mean of `cos(μ_i - μ_G, w_j - w̄)` over `i != j`: -1/(K-1) under perfect collapse. A curve of Yang et al. 2022."""
    return _cosines(*_chosen(stats, weight, "both", global_mean, True, center_weight)).mean


def cos_cross_std(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Standard deviation of the cosines that `cos_cross` averages: 0 under perfect collapse."""
    return _cosines(*_chosen(stats, weight, "both", global_mean, True, center_weight)).std


# NC3: how well class means and class vectors agree -------------------------------------------------------------------


def class_alignment(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Each class's `cos(μ_k - μ_G, w_k - w̄)`, as in Yang et al. 2022, arXiv 2203.09081.

    `[K]` in [-1, 1]; 1 under perfect collapse; NaN for classes without samples.
    """
    result = stats.means.new_full(stats.counts.shape, math.nan)
    means, vectors = _chosen(stats, weight, "both", global_mean, True, center_weight)
    result[_present(stats)] = (means * vectors).sum(1) / (means.norm(dim=1) * vectors.norm(dim=1))
    return result


def alignment(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Mean of `class_alignment` over the classes that have samples: 1 under perfect collapse."""
    return class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[_present(stats)].mean()


def alignment_std(
    stats: Moments, weight: Tensor, *, global_mean: GlobalMean = "class", center_weight: bool = True
) -> Tensor:
    """Standard deviation of `class_alignment` over the classes that have samples: 0 under perfect collapse."""
    return _std(class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[_present(stats)])


def nc3(
    stats: Moments,
    weight: Tensor,
    *,
    squared: bool = True,
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Self-duality, `‖M/‖M‖_F - W/‖W‖_F‖²_F`; `squared=False` takes the root, Papyan's form.

    `alignment` is the cosine form, `structure_error` that of the product `W Mᵀ`.

    Scalar in [0, 4] (squared); 0 under perfect collapse. From Papyan, Han & Donoho 2020, section "Self-duality"; squared in
    Yang et al. 2022.
    """
    if int(_present(stats).sum()) < 2:
        return _undefined(stats)
    means, vectors = _chosen(stats, weight, "both", global_mean, True, center_weight)
    distance: Tensor = (means / means.norm() - vectors / vectors.norm()).norm()
    return distance.square() if squared else distance


def structure_error(
    stats: Moments,
    weight: Tensor | None = None,
    *,
    of: Literal["cross", "means", "weights"] = "cross",
    global_mean: GlobalMean = "class",
    center_weight: bool = True,
) -> Tensor:
    """Distance of a normalised Gram matrix to that of the simplex, `‖G/‖G‖_F - (I - 11ᵀ/K)/sqrt(K-1)‖_F`.

    `G` `[K, K]` is `W Mᵀ` for `of="cross"` (NC3), `W Wᵀ` for "weights" and `M Mᵀ` for "means" (NC2); `center_weight=False` is the
    published form.

    Scalar in [0, 2]; 0 under perfect collapse. From Zhu et al. 2021, arXiv 2105.02375 (NC2 and NC3).
    """
    if of not in ("cross", "means", "weights"):
        raise ValueError(f'of is "cross", "means" or "weights", got {of!r}')
    chosen = _chosen(stats, weight, "both" if of == "cross" else of, global_mean, True, center_weight)
    K = len(chosen[0])
    if K < 2:
        return _undefined(stats)
    gram = chosen[-1] @ chosen[0].T
    target = (torch.eye(K).to(gram) - 1 / K) / math.sqrt(K - 1)
    error: Tensor = (gram / gram.norm() - target).norm()
    return error


# NC4: whether the head decides like the nearest class centre ---------------------------------------------------------


class Centres(NamedTuple):
    """The means of n classes, prepared for `nearest_centre` of many batches.

    Attributes:
        classes: The classes that have samples, `[n]` int64.
        origin: The mean of their means, `[d]`.
        means: Their means less the origin, `[n, d]`.
        offsets: Half of the squared norms of these, `[n]`.
    """

    classes: Tensor
    origin: Tensor
    means: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, stats: Moments) -> Self:
        """Prepare the means of class statistics.

        Raises:
            ValueError: No class has samples.
        """
        classes = _present(stats).nonzero().squeeze(1)
        if len(classes) == 0:
            raise ValueError("no class has samples: there is no centre")
        origin = stats.means[classes].mean(0)
        means = stats.means[classes] - origin
        return cls(classes, origin, means, 0.5 * means.square().sum(1))


def nearest_centre(features: Tensor, stats: Moments | Centres) -> Tensor:
    """The class whose mean is nearest, `argmin_k ‖h - μ_k‖`, among classes that have samples.

    Args:
        features: The features `[B, d]`.
        stats: The class statistics, whose means are the centres.

    Returns:
        The classes, `[B]` int64; -1 for a feature that is not finite.

    Raises:
        ValueError: No class has samples.

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    classes, origin, means, offsets = Centres.of(stats) if isinstance(stats, Moments) else stats
    nearest = []
    for part in parts_by_distances(features.detach(), len(classes)):
        scores = (in_float64(part).to(means) - origin) @ means.T - offsets
        best, index = scores.max(1)
        nearest.append(torch.where(best.isfinite(), classes[index], -1))
    return torch.cat(nearest)


def parts_by_distances(features: Tensor, others: int) -> tuple[Tensor, ...]:
    """Split rows so that the distances of each part to `others` points fit into memory."""
    return torch.split(features, max(1, _MOST_DISTANCES // others))


def agreement(decision: Tensor, nearest: Tensor) -> Tensor:
    """Share of samples on which two decisions `[B]` agree, such as a head's and `nearest_centre`'s.

    Scalar in [0, 1]; NaN if one of them is -1, which is no decision.
    """
    nearest = nearest.to(decision.device)
    agree = torch.where((decision < 0) | (nearest < 0), math.nan, (decision == nearest).float())
    return in_float64(agree).mean()


def nc4(
    features: Tensor, stats: Moments, weight: Tensor, bias: Tensor | None = None, *, mismatch: bool = False
) -> Tensor:
    """Agreement of the head's decision, `argmax_k ⟨w_k, h⟩ + b_k`, with the nearest class centre.

    For another head, compare its own decision: `agreement(logits.argmax(1), nearest_centre(features, stats))`.

    Args:
        features: The features `[B, d]`.
        stats: The class statistics, whose means are the centres.
        weight: The class vectors `[K, d]`.
        bias: The biases `[K]`, or None.
        mismatch: Whether to return the share of disagreement, Papyan's form.

    Returns:
        Scalar in [0, 1]; 1 under perfect collapse (0 with `mismatch`).

    Source:
        Papyan, Han & Donoho 2020, section "Convergence to nearest class center".
    """
    share = agreement(_logits(features, weight, bias).argmax(1), nearest_centre(features, stats))
    return 1 - share if mismatch else share


def nc4_centres(stats: Moments, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Share of class means that the head, bias included, assigns to their own class: NC4 on the centres, without a sample.

    Scalar in [0, 1]; 1 under perfect collapse.
    """
    classes = _present(stats).nonzero().squeeze(1)
    largest, decisions = _logits(stats.means[classes], weight, bias).max(1)
    return agreement(decisions, torch.where(largest.isfinite(), classes, -1))


def _logits(features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    features = in_float64(features.detach())
    logits = features @ in_float64(weight.detach()).to(features).T
    return logits if bias is None else logits + in_float64(bias.detach()).to(logits)


# NC5: whether the features of unknown images are orthogonal to the class means ---------------------------------------


def nc5(stats: Moments, unknown_mean: Tensor) -> Tensor:
    """Mean absolute cosine of the class means and the mean feature of unknown images, `mean_k |cos(μ_k, μ_U)|`; neither is centred.

    Not in `summary`, since it needs images of classes that the model does not know. Features after a ReLU are never negative, so their
    means have positive cosines.

    Args:
        stats: The class statistics of the training features.
        unknown_mean: The mean feature `[d]` of the unknown images.

    Returns:
        Scalar in [0, 1]; 0 if all class means are orthogonal to it.

    Source:
        Ben Ammar et al., "NECO: NEural Collapse Based Out-of-distribution detection", ICLR 2024, arXiv 2310.06823.
    """
    means, mean = stats.means[_present(stats)], in_float64(unknown_mean.detach()).to(stats.means)
    cosines: Tensor = (means @ mean) / (means.norm(dim=1) * mean.norm())
    return cosines.abs().mean()


# Spectra, and how many directions they fill --------------------------------------------------------------------------


def spectrum(stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class") -> Tensor:
    """Singular values of the centred means `M`, or of `Σ_W` with `of="within"`.

    Descending, >= 0: `[min(K - 1, d)]` for the means, all equal under perfect collapse; `[d]` for `Σ_W`, all 0 then.
    """
    if of not in ("means", "within"):
        raise ValueError(f'of is "means" or "within", got {of!r}')
    if of == "means":
        return _factor(stats, global_mean).singular
    within = stats.covariance()
    if not bool(within.isfinite().all()):
        return within.new_full((len(within),), math.nan)
    eigenvalues: Tensor = torch.linalg.eigvalsh(within)
    return eigenvalues.flip(0).clamp(min=0)


def effective_rank(
    stats: Moments, *, of: Literal["means", "within"] = "means", global_mean: GlobalMean = "class"
) -> Tensor:
    """Exponential of the entropy of the `spectrum`, normalised to sum 1 (Roy & Vetterli 2007, "The effective rank").

    Scalar in [1, number of singular values]; K - 1 for the means under perfect collapse; NaN for a zero matrix.
    """
    return effective_rank_of_values(spectrum(stats, of=of, global_mean=global_mean))


def effective_rank_of_values(singular: Tensor) -> Tensor:
    """The `effective_rank` of singular values `[n]`; NaN if there are none."""
    if len(singular) == 0:
        return singular.new_full((), math.nan)
    share = singular / singular.sum()
    entropy: Tensor = torch.special.entr(share).sum()
    return entropy.exp()
