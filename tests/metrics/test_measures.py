import inspect
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from etflight.geometry import nearest_etf, simplex_etf
from etflight.metrics import ClassStatistics, measures
from tests.metrics import oracle
from tests.metrics.data import clusters

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


def case(name):
    K, d, counts = CASES[name]
    features, labels = clusters(K, d, counts=counts)
    return features, labels, K


def collect(features, labels, K, **options):
    metric = ClassStatistics(K, features.shape[1], **options)
    metric.update(features, labels)
    return metric.compute()


def class_vectors(K, d):
    g = torch.Generator().manual_seed(3)
    return torch.randn(K, d, generator=g) + 0.5, torch.randn(K, generator=g)


def close(actual, expected, rtol=1e-8, atol=1e-10):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)
    assert actual.dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("global_mean", ["class", "sample"])
class TestAgainstTheOracle:
    def test_nc1(self, name, global_mean):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K), oracle.two_pass(features, labels, K)
        for divide in (True, False):
            for correction in (0, 1):
                options = {"divide_by_classes": divide, "global_mean": global_mean, "correction": correction}
                close(measures.nc1(stats, **options), oracle.nc1(o, **options))

    def test_nc1_class_weighted(self, name, global_mean):
        features, labels, K = case(name)
        stats = collect(features, labels, K, class_counts=torch.bincount(labels, minlength=K))
        o = oracle.two_pass(features, labels, K, class_weighted=True)
        close(measures.nc1(stats, global_mean=global_mean), oracle.nc1(o, global_mean=global_mean))
        with pytest.raises(ValueError, match="class-weighted"):
            measures.nc1(stats, correction=1)

    def test_nc1_ratio_and_per_class(self, name, global_mean):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        close(measures.nc1_per_class(stats, global_mean=global_mean), oracle.nc1_per_class(o, global_mean))
        for weighting in ("class", "sample"):
            for correction in (0, 1):
                for divide in (True, False):
                    options = {
                        "weighting": weighting,
                        "divide_by_classes": divide,
                        "global_mean": global_mean,
                        "correction": correction,
                    }
                    close(measures.nc1_ratio(stats, **options), oracle.nc1_ratio(o, **options))

    def test_norms_and_angles(self, name, global_mean):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        weight, _ = class_vectors(K, features.shape[1])
        for center_means in (True, False):
            for center_weight in (True, False):
                shared = {
                    "global_mean": global_mean,
                    "center_means": center_means,
                    "center_weight": center_weight,
                }
                m = oracle.centred(o, global_mean) if center_means else o.means[o.present]
                w = oracle.vectors(o, weight, center_weight)
                for correction in (0, 1):
                    sizes = [oracle.equinorm(m, correction), oracle.equinorm(w, correction)]
                    for of, expected in (("means", sizes[0]), ("weights", sizes[1]), ("both", np.mean(sizes))):
                        close(measures.nc2_equinorm(stats, weight, of=of, correction=correction, **shared), expected)
                for deviation in ("etf", "std"):
                    angles = [oracle.equiangularity(m, deviation), oracle.equiangularity(w, deviation)]
                    for of, expected in (("means", angles[0]), ("weights", angles[1]), ("both", np.mean(angles))):
                        options = {"of": of, "deviation": deviation, "tile": 3, **shared}
                        close(measures.nc2_equiangularity(stats, weight, **options), expected)
                of_means = {"global_mean": global_mean, "center_means": center_means}
                for prefix, args, options, cosines in (
                    ("cos_means", (stats,), of_means, oracle.cosines(m, m)),
                    ("cos_weights", (stats, weight), {"center_weight": center_weight}, oracle.cosines(w, w)),
                    ("cos_cross", (stats, weight), shared, oracle.cosines(m, w)),
                ):
                    close(getattr(measures, prefix)(*args, **options), cosines.mean())
                    close(getattr(measures, f"{prefix}_std")(*args, **options), cosines.std())
                aligned = oracle.alignments(m, w)
                close(measures.class_alignment(stats, weight, **shared)[o.present], aligned)
                assert measures.class_alignment(stats, weight, **shared)[~torch.from_numpy(o.present)].isnan().all()
                close(measures.alignment(stats, weight, **shared), aligned.mean())
                close(measures.alignment_std(stats, weight, **shared), aligned.std())

    def test_duality(self, name, global_mean):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        weight, _ = class_vectors(K, features.shape[1])
        m = oracle.centred(o, global_mean)
        for center_weight in (True, False):
            w = oracle.vectors(o, weight, center_weight)
            options = {"global_mean": global_mean, "center_weight": center_weight}
            close(measures.nc3(stats, weight, **options), oracle.nc3(m, w))
            close(measures.nc3(stats, weight, squared=False, **options), math.sqrt(oracle.nc3(m, w)), atol=1e-7)
            for of, left, right in (("cross", w, m), ("means", m, m), ("weights", w, w)):
                expected = oracle.structure_error(left, right)
                close(measures.structure_error(stats, weight, of=of, **options), expected)
                close(measures.structure_error(stats, weight, of=of, squared=True, **options), expected**2)

    def test_spectra(self, name, global_mean):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K), oracle.two_pass(features, labels, K)
        m = oracle.centred(o, global_mean)
        singular = np.linalg.svd(m, compute_uv=False)[: min(o.K - 1, m.shape[1])]
        close(measures.spectrum(stats, global_mean=global_mean), singular)
        close(measures.effective_rank(stats, global_mean=global_mean), oracle.effective_rank(m))
        close(measures.spectrum(stats, of="within"), np.linalg.svd(o.within, compute_uv=False))
        close(measures.effective_rank(stats, of="within"), oracle.effective_rank(o.within))


@pytest.mark.parametrize("name", CASES)
class TestAgainstTheOracleWithoutGlobalMean:
    @pytest.mark.parametrize("tile", [1, 3, 1024])
    def test_cdnv(self, name, tile):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        for exponent in (1, 2):
            for correction in (0, 1):
                options = {"exponent": exponent, "correction": correction}
                close(measures.cdnv(stats, tile=tile, **options), oracle.cdnv(o, **options))

    def test_etf_distance(self, name):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        weight, _ = class_vectors(K, features.shape[1])
        of_means = oracle.etf_distance(o.means[o.present])
        of_weights = oracle.etf_distance(oracle.vectors(o, weight))
        close(measures.etf_distance(stats), of_means)
        close(measures.etf_distance(stats, weight, of="weights"), of_weights)
        close(measures.etf_distance(stats, weight, of="both"), (of_means + of_weights) / 2)
        close(measures.etf_distance(stats, squared=False), math.sqrt(of_means), atol=1e-7)
        assert math.isnan(of_means) == (o.K > features.shape[1] + 1)
        if not math.isnan(of_means):
            close(measures.etf_distance(stats), 2 - 2 * nearest_etf(stats.means[torch.from_numpy(o.present)])[1])

    def test_nearest_centre_and_decisions(self, name):
        features, labels, K = case(name)
        stats, o = collect(features, labels, K, scatter=False), oracle.two_pass(features, labels, K)
        weight, bias = class_vectors(K, features.shape[1])
        bias = 2 * bias
        nearest = oracle.nearest_centre(o, features)
        for entries in (1, 37, 2**24):
            np.testing.assert_array_equal(measures.nearest_centre(features, stats, max_entries=entries), nearest)
        without = features.double().numpy() @ weight.double().numpy().T
        with_bias = without + bias.double().numpy()
        close(measures.nc4(features, stats, weight), (without.argmax(1) == nearest).mean())
        close(measures.nc4(features, stats, weight, bias), (with_bias.argmax(1) == nearest).mean())
        close(measures.nc4(features, stats, weight, bias, use_bias=False), (without.argmax(1) == nearest).mean())
        close(measures.nc4(features, stats, weight, bias, mismatch=True), (with_bias.argmax(1) != nearest).mean())
        decided = (o.means[o.present] @ weight.double().numpy().T + bias.double().numpy()).argmax(1)
        close(measures.nc4_centres(stats, weight, bias), (decided == np.flatnonzero(o.present)).mean())

    def test_summary_holds_each_measure_under_its_name(self, name):
        features, labels, K = case(name)
        stats = collect(features, labels, K)
        weight, bias = class_vectors(K, features.shape[1])
        for options in ({}, {"global_mean": "sample", "center_weight": False}):
            result = measures.summary(stats, weight, bias, **options)
            for key, value in result.items():
                if key in ("missing_classes", "single_sample_classes"):
                    continue
                function = getattr(measures, key.removesuffix("_weights").removesuffix("_within"), None)
                keywords = {}
                if key.endswith("_weights") and key.startswith("nc2"):
                    keywords["of"] = "weights"
                elif key.endswith("_within"):
                    keywords["of"] = "within"
                else:
                    function = getattr(measures, key)
                parameters = inspect.signature(function).parameters
                keywords |= {k: v for k, v in options.items() if k in parameters}
                given_ = {"stats": stats, "weight": weight, "bias": bias}
                expected = function(**{k: v for k, v in given_.items() if k in parameters}, **keywords)
                close(value, expected)
                assert value.shape == ()


def test_a_bias_turns_a_decision():
    features, labels = clusters(2, 3, counts=[20, 20], spread=0.01)
    stats = collect(features, labels, 2)
    weight = stats.means - stats.means.mean(0)
    threshold = -stats.means.square().sum(1) / 2
    assert measures.nc4(features, stats, weight, threshold) == 1
    assert measures.nc4(features, stats, weight, threshold + torch.tensor([100.0, 0])) == 0.5
    assert measures.nc4_centres(stats, weight, threshold) == 1
    assert measures.nc4_centres(stats, weight, threshold + torch.tensor([100.0, 0])) == 0.5


def perfect(K, d, counts=None):
    frame = simplex_etf(K, d, dtype=torch.float64)
    labels = torch.repeat_interleave(torch.arange(K), torch.tensor(counts or [8] * K))
    return 3 * frame[labels] + 1.5, labels, frame  # a common offset does not matter


@pytest.mark.parametrize(
    ("K", "d", "counts"), [(5, 4, None), (5, 9, None), (4, 8, [100, 30, 6, 1]), (2, 1, None), (2, 3, None)]
)
def test_perfect_collapse_gives_the_theoretical_values(K, d, counts):
    features, labels, frame = perfect(K, d, counts)
    stats = collect(features, labels, K)
    weight = 0.3 * frame + 0.7
    result = measures.summary(stats, weight, -1.5 * 0.3 * frame.sum(1))
    zero = [
        "nc1", "nc1_ratio", "cdnv", "nc2_equinorm", "nc2_equiangularity", "etf_distance", "nc2_equinorm_weights",
        "nc2_equiangularity_weights", "alignment_std", "nc3", "cos_means_std", "cos_weights_std", "cos_cross_std",
        "missing_classes",
    ]  # fmt: skip
    for key in zero:
        assert abs(float(result[key])) < 1e-12, key
    for key in ("cos_means", "cos_weights", "cos_cross"):
        close(result[key], -1 / (K - 1))
    close(result["alignment"], 1)
    close(result["effective_rank"], K - 1)
    close(result["nc4_centres"], 1)
    close(measures.spectrum(stats), np.full(K - 1, 3 * math.sqrt(K / (K - 1))))
    close(measures.structure_error(stats, weight), 0)
    close(measures.nc2_equiangularity(stats, deviation="std"), 0)
    close(measures.nc4(features, stats, frame, -1.5 * frame.sum(1)), 1)


def test_a_sample_weighted_global_mean_makes_a_perfect_frame_look_imperfect():
    features, labels, frame = perfect(4, 8, [100, 30, 6, 1])
    stats = collect(features, labels, 4)
    assert measures.nc2_equinorm(stats) < 1e-12
    assert measures.nc2_equinorm(stats, global_mean="sample") > 0.1
    assert measures.alignment(stats, frame, global_mean="sample") < 0.99


def test_centring_removes_what_a_softmax_does_not_see():
    features, labels, frame = perfect(5, 9)
    stats = collect(features, labels, 5)
    close(measures.alignment(stats, frame + 7), 1)
    close(measures.nc3(stats, frame + 7), 0)
    assert measures.alignment(stats, frame + 7, center_weight=False) < 0.9
    assert measures.nc3(stats, frame + 7, center_weight=False) > 0.1


@settings(max_examples=25, deadline=None)
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
    features, labels = (
        torch.cat([features[labels != 5], twin]),
        torch.cat([labels[labels != 5], 0 * twin[:, 0].long() + 5]),
    )
    stats, o = collect(features, labels, K), oracle.two_pass(features, labels, K)
    assert torch.equal(stats.means[0], stats.means[5])
    close(measures.nc1(stats), oracle.nc1(o))
    assert measures.cdnv(stats) == math.inf
    assert measures.cdnv(stats, exponent=1) == math.inf
    if d >= K - 1:
        assert 0 < measures.etf_distance(stats) < 2
        close(measures.etf_distance(stats), oracle.etf_distance(o.means))


def test_centres_that_nearly_coincide_keep_the_digits_of_their_distance():
    features, labels = clusters(5, 12, dtype=torch.float64)
    features[labels == 1] = features[labels == 0][: (labels == 1).sum()].mean(0) + 1e-7
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


def test_missing_and_single_sample_classes_are_counted():
    features, labels, K = case("missing")
    result = measures.summary(collect(features, labels, K))
    assert result["missing_classes"] == 2
    assert result["single_sample_classes"] == 1


@pytest.mark.parametrize("counts", [[0, 0, 0], [0, 5, 0]])
def test_fewer_than_two_classes_give_nan_and_no_error(counts):
    features, labels = clusters(3, 4, counts=counts)
    weight, bias = class_vectors(3, 4)
    result = measures.summary(collect(features, labels, 3), weight, bias)
    for key in (
        "nc1",
        "nc1_ratio",
        "cdnv",
        "nc2_equinorm",
        "etf_distance",
        "cos_means",
        "cos_cross_std",
        "effective_rank",
    ):
        assert result[key].isnan(), key
    assert result["missing_classes"] == counts.count(0)


def test_features_that_are_not_finite_give_nan_and_no_error():
    features, labels = clusters(5, 12)
    features[7] = torch.nan
    result = measures.summary(collect(features, labels, 5), *class_vectors(5, 12))
    assert all(result[key].isnan() for key in ("nc1", "nc1_ratio", "cdnv", "etf_distance", "effective_rank_within"))


def test_without_scatter_or_class_vectors_their_measures_are_left_out():
    features, labels = clusters(5, 12)
    bare = measures.summary(collect(features, labels, 5, scatter=False))
    assert not {"nc1", "effective_rank_within", "alignment", "cos_weights"} & set(bare)
    assert {"cdnv", "effective_rank"} <= set(bare)
    assert "effective_rank" not in measures.summary(collect(features, labels, 5), spectra=False)
    with pytest.raises(ValueError, match="scatter"):
        measures.nc1(collect(features, labels, 5, scatter=False))
    with pytest.raises(ValueError, match="scatter"):
        measures.spectrum(collect(features, labels, 5, scatter=False), of="within")


@pytest.mark.parametrize(
    "call",
    [
        lambda s, w: measures.cdnv(s, exponent=3),
        lambda s, w: measures.nc1(s, global_mean="median"),
        lambda s, w: measures.nc1_ratio(s, weighting="none"),
        lambda s, w: measures.nc2_equinorm(s, of="weights"),
        lambda s, w: measures.nc2_equinorm(s, w, of="neither"),
        lambda s, w: measures.nc2_equiangularity(s, deviation="var"),
        lambda s, w: measures.structure_error(s, w, of="both"),
        lambda s, w: measures.spectrum(s, of="weights"),
        lambda s, w: measures.alignment(s, w[:, :3]),
        lambda s, w: measures.nc3(s, w[:2]),
    ],
)
def test_unknown_options_and_wrong_shapes_are_refused(call):
    features, labels = clusters(5, 12)
    with pytest.raises(ValueError, match=r" is | needs | must "):
        call(collect(features, labels, 5), class_vectors(5, 12)[0])


def test_every_public_measure_documents_shapes_and_collapse():
    for name in measures.__all__:
        doc = inspect.getdoc(getattr(measures, name))
        assert "same arguments" in doc or name in ("summary", "agreement") or ("Args:" in doc and "Returns:" in doc), (
            name
        )
        if name not in ("summary", "agreement", "centred_means", "nearest_centre"):
            assert "collapse" in doc, name
