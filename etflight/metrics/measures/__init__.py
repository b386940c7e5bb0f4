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

import torch
from torch import Tensor

from etflight.metrics.measures.centres import (
    Centres,
    agreement,
    nc4,
    nc4_centres,
    nc5,
    nearest_centre,
    parts_by_distances,
)
from etflight.metrics.measures.duality import alignment, alignment_std, class_alignment, nc3, structure_error
from etflight.metrics.measures.simplex import (
    cos_cross,
    cos_cross_std,
    cos_means,
    cos_means_std,
    cos_weights,
    cos_weights_std,
    cosine_statistics,
    etf_distance,
    etf_distance_of_decomposition,
    nc2_equiangularity,
    nc2_equinorm,
)
from etflight.metrics.measures.spectra import effective_rank, effective_rank_of_values, spectrum
from etflight.metrics.measures.variability import cdnv, nc1, nc1_of_decomposition, nc1_per_class, nc1_ratio
from etflight.metrics.measures.vectors import centred_means, class_vectors, decomposition_of_means
from etflight.metrics.statistics import Moments

__all__ = [
    "Centres",
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
    "effective_rank_of_values",
    "etf_distance",
    "nc1",
    "nc1_per_class",
    "nc1_ratio",
    "nc2_equiangularity",
    "nc2_equinorm",
    "nc3",
    "nc4",
    "nc4_centres",
    "nc5",
    "nearest_centre",
    "parts_by_distances",
    "spectrum",
    "structure_error",
    "summary",
]


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
        `cos_weights`, `cos_cross` and their `std_of`; `effective_rank`, `effective_rank_within`; and the counts `missing_classes` (no
        samples) and `single_sample_classes` (their variance is 0 by necessity, which makes the variability look small).
    """
    result: dict[str, Tensor] = {}
    factor = decomposition_of_means(stats, "class")
    if stats.within is not None:
        result["nc1"] = nc1_of_decomposition(stats, factor, True, 0)
    result["nc1_ratio"] = nc1_ratio(stats)
    result["cdnv"] = cdnv(stats)
    result["nc2_equinorm"] = nc2_equinorm(stats)
    means = cosine_statistics(centred_means(stats))
    result["nc2_equiangularity"] = means.deviation
    result["etf_distance"] = etf_distance_of_decomposition(factor)
    result["cos_means"], result["cos_means_std"] = means.mean, means.std
    if weight is not None:
        vectors = class_vectors(stats, weight, True)
        weights, cross = cosine_statistics(vectors), cosine_statistics(centred_means(stats), vectors)
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
