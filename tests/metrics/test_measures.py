import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etflight.geometry import nearest_etf, simplex_etf
from etflight.metrics import ClassStatistics, measures
from tests.metrics import oracle
from tests.metrics.oracle import clusters

# K, d, samples per class: K < d, K = d + 1, K - 1 > d, missing classes, single samples, long-tailed, two classes, one dimension
CASES = {
    "K < d": (7, 12, None),
    "K = d + 1": (7, 6, None),
    "K - 1 > d": (11, 6, None),
    "missing": (8, 12, [30, 0, 12, 5, 0, 1, 9, 40]),
    "missing, K - 1 > d": (9, 4, [30, 0, 12, 5, 8, 1, 9, 40, 3]),
    "long tail": (6, 10, [200, 80, 33, 12, 4, 2]),
    "two classes": (2, 5, [9, 17]),
    "one dimension": (2, 1, [9, 17]),
}


def collect(features, labels, K, **options):
    metric = ClassStatistics(K, features.shape[1], **options)
    metric.update(features, labels)
    return metric.compute()


def class_vectors(K, d):
    g = torch.Generator().manual_seed(3)
    return torch.randn(K, d, generator=g) + 0.5, 2 * torch.randn(K, generator=g)


def close(actual, expected, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
    assert actual.dtype == torch.float64


@pytest.fixture(params=CASES)
def case(request, monkeypatch):
    """Statistics, the oracle's, class vectors, biases, and the features; pairs of classes are taken three by three."""
    monkeypatch.setattr(measures.vectors, "_TILE", 3)
    monkeypatch.setattr(measures.centres, "_MOST_DISTANCES", 37)
    K, d, counts = CASES[request.param]
    features, labels = clusters(K, d, counts=counts)
    stats, o = collect(features, labels, K), oracle.two_pass(features, labels, K)
    return stats, o, *class_vectors(K, d), features, labels


GLOBAL = {"global_mean": ("class", "sample")}
WEIGHT = {"center_weight": (True, False)}


def grid(**choices):
    return [dict(zip(choices, chosen, strict=True)) for chosen in product(*choices.values())]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nc1", grid(divide_by_classes=(True, False), correction=(0, 1), **GLOBAL)),
        ("nc1_ratio", grid(weighting=("class", "sample"), correction=(0, 1), **GLOBAL)),
        ("nc1_per_class", grid(**GLOBAL)),
        ("cdnv", grid(exponent=(1, 2), correction=(0, 1))),
    ],
)
def test_variability_equals_the_oracles(case, name, options):
    stats, o, *_ = case
    for chosen in options:
        close(getattr(measures, name)(stats, **chosen), getattr(oracle, name)(o, **chosen))


@pytest.mark.parametrize("global_mean", ["class", "sample"])
def test_nc1_class_weighted(case, global_mean):
    features, labels = case[-2:]
    K = len(case[0].counts)
    stats = collect(features, labels, K, class_counts=torch.bincount(labels, minlength=K))
    o = oracle.two_pass(features, labels, K, class_weighted=True)
    close(measures.nc1(stats, global_mean=global_mean), oracle.nc1(o, global_mean=global_mean))
    with pytest.raises(ValueError, match="class-weighted"):
        measures.nc1(stats, correction=1)


def test_norms_and_angles_equal_the_oracles(case):
    stats, o, weight, *_ = case
    for options in grid(center_means=(True, False), **GLOBAL, **WEIGHT):
        m = oracle.centred(o, options["global_mean"]) if options["center_means"] else o.means[o.present]
        w = oracle.vectors(o, weight, options["center_weight"])
        for name, expected, more in (
            ("nc2_equinorm", oracle.equinorm, {}),
            ("nc2_equiangularity", oracle.equiangularity, {"deviation": "etf"}),
            ("nc2_equiangularity", oracle.equiangularity, {"deviation": "std"}),
        ):
            of_means, of_weights = expected(m, **more), expected(w, **more)
            for of, value in (("means", of_means), ("weights", of_weights), ("both", (of_means + of_weights) / 2)):
                close(getattr(measures, name)(stats, weight, of=of, **options, **more), value)


def test_means_and_class_vectors_agree_as_the_oracles_do(case):
    stats, o, weight, *_ = case
    for options in grid(**GLOBAL, **WEIGHT):
        m, w = oracle.centred(o, options["global_mean"]), oracle.vectors(o, weight, options["center_weight"])
        of_means, of_weights = {"global_mean": options["global_mean"]}, {"center_weight": options["center_weight"]}
        for name, args, own, cosines in (
            ("cos_means", (stats,), of_means, oracle.cosines(m, m)),
            ("cos_weights", (stats, weight), of_weights, oracle.cosines(w, w)),
            ("cos_cross", (stats, weight), options, oracle.cosines(m, w)),
            ("alignment", (stats, weight), options, oracle.alignments(m, w)),
        ):
            close(getattr(measures, name)(*args, **own), cosines.mean())
            close(getattr(measures, f"{name}_std")(*args, **own), cosines.std())
        aligned = measures.class_alignment(stats, weight, **options)
        close(aligned[o.present], oracle.alignments(m, w))
        assert aligned[~torch.from_numpy(o.present)].isnan().all()
        for squared in (True, False):
            close(measures.nc3(stats, weight, squared=squared, **options), oracle.nc3(m, w, squared), atol=1e-7)
        for of, left, right in (("cross", w, m), ("means", m, m), ("weights", w, w)):
            close(measures.structure_error(stats, weight, of=of, **options), oracle.structure_error(left, right))


@pytest.mark.parametrize("global_mean", ["class", "sample"])
def test_spectra_equal_the_oracles(case, global_mean):
    stats, o, *_ = case
    m = oracle.centred(o, global_mean)
    singular = np.linalg.svd(m, compute_uv=False)[: min(o.K - 1, m.shape[1])]
    close(measures.spectrum(stats, global_mean=global_mean), singular)
    close(measures.effective_rank(stats, global_mean=global_mean), oracle.effective_rank(m))
    close(measures.spectrum(stats, of="within"), np.linalg.svd(o.within, compute_uv=False))
    close(measures.effective_rank(stats, of="within"), oracle.effective_rank(o.within))


def test_the_distance_to_the_nearest_frame_equals_the_oracles(case):
    stats, o, weight, *_ = case
    of_means, of_weights = oracle.etf_distance(o.means[o.present]), oracle.etf_distance(oracle.vectors(o, weight))
    for of, expected in (("means", of_means), ("weights", of_weights), ("both", (of_means + of_weights) / 2)):
        close(measures.etf_distance(stats, weight, of=of), expected)
    assert math.isnan(of_means) == (o.K > stats.means.shape[1] + 1)
    if not math.isnan(of_means):
        close(measures.etf_distance(stats), 2 - 2 * nearest_etf(stats.means[torch.from_numpy(o.present)])[1])


def test_nearest_centres_and_decisions_equal_the_oracles(case):
    stats, o, weight, bias, features, _ = case
    nearest = oracle.nearest_centre(o, features)
    np.testing.assert_array_equal(measures.nearest_centre(features, stats), nearest)
    without = features.double().numpy() @ weight.double().numpy().T
    with_bias = without + bias.double().numpy()
    close(measures.nc4(features, stats, weight), (without.argmax(1) == nearest).mean())
    close(measures.nc4(features, stats, weight, bias), (with_bias.argmax(1) == nearest).mean())
    close(measures.nc4(features, stats, weight, bias, mismatch=True), (with_bias.argmax(1) != nearest).mean())
    decided = (o.means[o.present] @ weight.double().numpy().T + bias.double().numpy()).argmax(1)
    close(measures.nc4_centres(stats, weight, bias), (decided == np.flatnonzero(o.present)).mean())


def test_summary_holds_each_measure_under_its_name(case):
    stats, o, weight, bias, *_ = case
    alone = ["nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "etf_distance", "effective_rank"]
    paired = ["alignment", "alignment_std", "nc3", "cos_weights", "cos_weights_std", "cos_cross", "cos_cross_std"]
    expected = {
        **{name: getattr(measures, name)(stats) for name in [*alone, "cos_means", "cos_means_std"]},
        **{name: getattr(measures, name)(stats, weight) for name in paired},
        "nc2_equinorm_weights": measures.nc2_equinorm(stats, weight, of="weights"),
        "nc2_equiangularity_weights": measures.nc2_equiangularity(stats, weight, of="weights"),
        "nc4_centres": measures.nc4_centres(stats, weight, bias),
        "effective_rank_within": measures.effective_rank(stats, of="within"),
        "missing_classes": (o.counts == 0).sum(),
        "single_sample_classes": (o.counts == 1).sum(),
    }
    result = measures.summary(stats, weight, bias)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        close(value, expected[name])
        assert value.shape == ()


def perfect(K, d, counts=None):
    frame = simplex_etf(K, d, dtype=torch.float64)
    labels = torch.repeat_interleave(torch.arange(K), torch.tensor(counts or [8] * K))
    return 3 * frame[labels] + 1.5, labels, frame  # a common offset does not matter


@pytest.mark.parametrize(("K", "d", "counts"), [(5, 4, None), (4, 8, [100, 30, 6, 1]), (2, 1, None)])
def test_perfect_collapse_gives_the_theoretical_values(K, d, counts):
    features, labels, frame = perfect(K, d, counts)
    stats = collect(features, labels, K)
    weight, bias = 0.3 * frame + 0.7, -1.5 * 0.3 * frame.sum(1)
    theory = {
        "cos_means": -1 / (K - 1), "cos_weights": -1 / (K - 1), "cos_cross": -1 / (K - 1), "alignment": 1, "nc4_centres": 1,
        "effective_rank": K - 1, "single_sample_classes": (stats.counts == 1).sum(),
    }  # fmt: skip
    for name, value in measures.summary(stats, weight, bias).items():
        if name != "effective_rank_within":
            close(value, theory.get(name, 0), atol=1e-12)
    close(measures.spectrum(stats), np.full(K - 1, 3 * math.sqrt(K / (K - 1))))
    close(measures.structure_error(stats, weight), 0)
    close(measures.nc2_equiangularity(stats, deviation="std"), 0)
    close(measures.nc4(features, stats, weight, bias), 1)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), K=st.integers(2, 9), d=st.integers(1, 12), scale=st.sampled_from([1e-3, 1.0, 50.0]))
def test_permuting_classes_rotating_shifting_and_scaling_change_no_measure(seed, K, d, scale):
    features, labels = clusters(K, d, seed=seed, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(K, d, generator=g, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=g, dtype=torch.float64))[0]
    order = torch.randperm(K, generator=g)
    expected = measures.summary(collect(features, labels, K), weight)
    moved = collect(scale * (features @ rotation) + 2.0, order[labels], K)
    turned = torch.empty_like(weight)
    turned[order] = 0.7 * weight @ rotation - 3.0
    actual = measures.summary(moved, turned)
    for key in expected:
        if key != "nc4_centres":  # a decision without the matching bias is not invariant to a shift
            np.testing.assert_allclose(actual[key], expected[key], rtol=1e-7, atol=1e-7, err_msg=key)


@pytest.mark.parametrize("d", [12, 3])
def test_coinciding_centres_are_left_out_of_nc1_and_make_cdnv_infinite(d):
    K = 6
    features, labels = clusters(K, d, dtype=torch.float64)
    twin = features[labels == 0]
    features = torch.cat([features[labels != 5], twin])
    labels = torch.cat([labels[labels != 5], torch.full((len(twin),), 5)])
    stats, o = collect(features, labels, K), oracle.two_pass(features, labels, K)
    assert torch.equal(stats.means[0], stats.means[5])
    close(measures.nc1(stats), oracle.nc1(o))
    assert measures.cdnv(stats) == measures.cdnv(stats, exponent=1) == math.inf
    if d >= K - 1:
        close(measures.etf_distance(stats), oracle.etf_distance(o.means))


def test_centres_that_nearly_coincide_keep_the_digits_of_their_distance():
    features, labels = clusters(5, 12, dtype=torch.float64)
    o = oracle.two_pass(features, labels, 5)
    o.means[1] = o.means[0] + 1e-9
    stats = collect(features, labels, 5)._replace(means=torch.from_numpy(o.means))
    close(measures.cdnv(stats), oracle.cdnv(o), rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_network_collapsed_to_one_point_is_not_measured_by_its_rounding_errors(seed):
    cloud = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
    stats = collect(cloud.repeat(3, 1), torch.arange(3).repeat_interleave(6), 3)
    assert measures.nc1(stats).isnan()
    assert measures.etf_distance(stats).isnan()
    assert measures.effective_rank(stats).isnan()


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 5, 0]])
def test_fewer_than_two_classes_give_nan_and_no_error(counts):
    features, labels = clusters(3, 4, counts=counts)
    weight, bias = class_vectors(3, 4)
    result = measures.summary(collect(features, labels, 3), weight, bias)
    undefined = {"nc1", "nc1_ratio", "cdnv", "nc2_equinorm"} | {"nc3", "etf_distance", "cos_means", "cos_cross_std"}
    assert not {key for key in undefined | {"effective_rank"} if not result[key].isnan()}
    assert result["missing_classes"] == counts.count(0)


def test_features_that_are_not_finite_give_nan_and_no_error():
    features, labels = clusters(5, 12)
    features[7] = torch.nan
    result = measures.summary(collect(features, labels, 5), *class_vectors(5, 12))
    of_weights = {key for key in result if key.endswith("_weights") or key.startswith("cos_weights")}
    counts = {"missing_classes", "single_sample_classes"}
    assert {key for key, measure in result.items() if not measure.isnan()} == of_weights | counts


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_feature_that_is_no_number_is_nearest_to_no_centre_and_makes_the_agreement_nan(value):
    (features, labels), (weight, bias) = clusters(5, 12), class_vectors(5, 12)
    stats = collect(features, labels, 5)
    for mismatch in (False, True):
        assert measures.nc4(features, stats, weight, bias, mismatch=mismatch).isfinite()
        broken = features.index_fill(0, torch.tensor([7]), value)
        assert measures.nc4(broken, stats, weight, bias, mismatch=mismatch).isnan()
    nearest = measures.nearest_centre(broken, stats)
    assert nearest[7] == -1
    assert torch.equal(nearest[8:], measures.nearest_centre(features[8:], stats))


def test_without_scatter_or_class_vectors_their_measures_are_left_out():
    features, labels = clusters(5, 12)
    bare = collect(features, labels, 5, scatter=False)
    assert not {"nc1", "effective_rank_within", "alignment", "cos_weights"} & set(measures.summary(bare))
    assert {"cdnv", "effective_rank"} <= set(measures.summary(bare))
    assert "effective_rank" not in measures.summary(bare, spectra=False)


@pytest.mark.parametrize(
    "call",
    [
        lambda s, w: measures.cdnv(s, exponent=3),
        lambda s, w: measures.nc1(s, global_mean="median"),
        lambda s, w: measures.nc1(s._replace(within=None)),
        lambda s, w: measures.nc1_ratio(s, weighting="none"),
        lambda s, w: measures.nc2_equinorm(s, of="weights"),
        lambda s, w: measures.nc2_equinorm(s, w, of="neither"),
        lambda s, w: measures.nc2_equiangularity(s, deviation="var"),
        lambda s, w: measures.structure_error(s, w, of="both"),
        lambda s, w: measures.spectrum(s, of="weights"),
        lambda s, w: measures.alignment(s, w[:, :3]),
        lambda s, w: measures.nearest_centre(w, s._replace(counts=0 * s.counts)),
    ],
)
def test_unknown_options_wrong_shapes_and_what_is_missing_are_refused(call):
    features, labels = clusters(5, 12)
    with pytest.raises(ValueError, match=r" is | needs? | must | has "):
        call(collect(features, labels, 5), class_vectors(5, 12)[0])


def test_nc5_is_the_mean_cosine_of_class_means_and_the_mean_of_unknown_features(case):
    stats, o, *_ = case
    unknown = torch.linspace(-1, 2, stats.means.shape[1])
    means, mean = o.means[o.present], unknown.double().numpy()
    cosines = means @ mean / np.linalg.norm(means, axis=1) / np.linalg.norm(mean)
    close(measures.nc5(stats, unknown), np.abs(cosines).mean())


def test_nc5_is_zero_where_unknown_features_are_orthogonal_to_a_frame():
    frame = simplex_etf(4, 9, dtype=torch.float64)
    beside = torch.linalg.svd(frame)[2][-1]
    stats = collect(frame.repeat(2, 1), torch.arange(8) % 4, 4)
    assert measures.nc5(stats, beside).item() < 1e-12
    assert measures.nc5(stats, frame[0]).item() == pytest.approx((1 + 3 / 3) / 4)
