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

import torch
from torch import Tensor

from etflight.metrics.measures.between import between_classes
from etflight.metrics.measures.centring import GlobalMean, centred_means, has_samples, undefined
from etflight.metrics.measures.cosines import (
    cos_cross,
    cos_cross_std,
    cos_means,
    cos_means_std,
    cos_weights,
    cos_weights_std,
    pairwise_cosines,
)
from etflight.metrics.measures.decision import agreement, nc4, nc4_centres, nearest_centre
from etflight.metrics.measures.duality import (
    alignment,
    alignment_std,
    class_alignment,
    mean_and_std,
    nc3,
    structure_error,
)
from etflight.metrics.measures.simplex import etf_distance, etf_distance_of_factor, nc2_equiangularity, nc2_equinorm
from etflight.metrics.measures.spectra import effective_rank, effective_rank_of_values, spectrum
from etflight.metrics.measures.variability import cdnv, nc1, nc1_of_factor, nc1_per_class, nc1_ratio
from etflight.metrics.statistics import Moments

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
    present = has_samples(stats)
    enough = int(present.sum()) >= 2
    between = between_classes(stats, global_mean) if enough else None
    if stats.within is not None:
        result["nc1"] = nc1_of_factor(stats, stats.within, between, True, 0) if between else undefined(stats)
    result["nc1_ratio"] = nc1_ratio(stats, global_mean=global_mean) if enough else undefined(stats)
    result["cdnv"] = cdnv(stats)
    result["nc2_equinorm"] = nc2_equinorm(stats, global_mean=global_mean)
    means = pairwise_cosines(stats, None, "means", global_mean, True, center_weight)
    result["nc2_equiangularity"] = means.deviation
    # The nearest frame is centred without weights, so only then the factor can be shared.
    result["etf_distance"] = (
        etf_distance_of_factor(between) if between and global_mean == "class" else etf_distance(stats)
    )
    result["cos_means"], result["cos_means_std"] = means.mean, means.std
    if weight is not None:
        vectors = pairwise_cosines(stats, weight, "weights", global_mean, True, center_weight)
        cross = pairwise_cosines(stats, weight, "both", global_mean, True, center_weight)
        result["nc2_equinorm_weights"] = nc2_equinorm(stats, weight, of="weights", center_weight=center_weight)
        result["nc2_equiangularity_weights"] = vectors.deviation
        aligned = class_alignment(stats, weight, global_mean=global_mean, center_weight=center_weight)[present]
        result["alignment"], result["alignment_std"] = mean_and_std(aligned)
        result["nc3"] = nc3(stats, weight, global_mean=global_mean, center_weight=center_weight)
        result["nc4_centres"] = nc4_centres(stats, weight, bias)
        result["cos_weights"], result["cos_weights_std"] = vectors.mean, vectors.std
        result["cos_cross"], result["cos_cross_std"] = cross.mean, cross.std
    if spectra:
        result["effective_rank"] = effective_rank_of_values(between.singular) if between else undefined(stats)
        if stats.within is not None:
            result["effective_rank_within"] = effective_rank(stats, of="within")
    result["missing_classes"] = (stats.counts == 0).sum().to(torch.float64)
    result["single_sample_classes"] = (stats.counts == 1).sum().to(torch.float64)
    return result
