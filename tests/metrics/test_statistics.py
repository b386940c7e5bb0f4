import copy
import io
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics import MetricCollection

from etflight.metrics import ClassStatistics, measures
from tests.metrics import oracle
from tests.metrics.oracle import clusters
from tests.tensors import HostReads

K, D = 7, 12
FEATURES, LABELS = clusters(K, D)
CONFIGS = {
    "scatter": {},
    "float32": {"scatter_dtype": torch.float32},
    "no scatter": {"scatter": False},
    "class-weighted": {"class_counts": [20 + 3 * (k % 5) for k in range(K)]},
}


def collect(features, labels, num_classes=K, batch=32, **options):
    metric = ClassStatistics(num_classes, features.shape[1], **options)
    for h, y in zip(features.split(batch), labels.split(batch), strict=True):
        metric.update(h, y)
    return metric


def assert_same(actual, expected, rtol=1e-10):
    assert actual.class_weighted == expected.class_weighted
    assert (actual.within is None) == (expected.within is None)
    for name, a, e in zip(actual._fields, actual, expected, strict=True):
        if isinstance(e, torch.Tensor):
            atol = rtol * float(e.double().nan_to_num().abs().max())
            torch.testing.assert_close(
                a, e, rtol=rtol, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.fixture(params=CONFIGS)
def options(request):
    return CONFIGS[request.param]


def rounding(options):
    """How close two ways to the same moments come, relatively."""
    return 2e-6 if "scatter_dtype" in options else 1e-11


def test_moments_equal_the_two_pass_oracle(options):
    moments = collect(FEATURES, LABELS, **options).compute()
    expected = oracle.two_pass(FEATURES, LABELS, K, class_weighted="class_counts" in options)
    tolerance = 1e-5 if "scatter_dtype" in options else 1e-12
    np.testing.assert_array_equal(moments.counts, expected.counts)
    np.testing.assert_allclose(moments.means, expected.means, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(moments.variances, expected.variances, rtol=tolerance)
    assert moments.counts.dtype == torch.int64
    assert moments.means.dtype == moments.variances.dtype == torch.float64
    assert moments.class_weighted == ("class_counts" in options)
    if options.get("scatter", True):
        np.testing.assert_allclose(moments.within, expected.within, rtol=0, atol=tolerance * expected.within.max())
    else:
        assert moments.within is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
# further from the origin, float32 features cannot be that tight
@pytest.mark.parametrize(("exponent", "offset"), [(0, 0.0), (5, 0.0), (9, 0.0), (13, 0.0), (6, 30.0), (11, 30.0)])
def test_nc1_keeps_its_digits_from_1_down_to_1e_13(exponent, dtype, tolerance, offset):
    level = 10.0**-exponent
    at_one = oracle.nc1(oracle.two_pass(*clusters(K, D, spread=1.0, dtype=torch.float64), K))
    features, labels = clusters(K, D, spread=math.sqrt(level / at_one), dtype=torch.float64, offset=0.0)
    features = (features + offset).float()
    expected = oracle.nc1(oracle.two_pass(features, labels, K))
    assert 0.3 * level < expected < 3 * level
    actual = measures.nc1(collect(features, labels, scatter_dtype=dtype).compute())
    assert abs(float(actual) / expected - 1) <= tolerance


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20)
@given(owners=st.lists(st.integers(0, 3), min_size=150, max_size=150), seed=st.integers(0, 100))
def test_any_order_any_batches_and_any_split_that_is_merged_give_the_same(name, owners, seed):
    options = CONFIGS[name]
    features, labels = clusters(K, D, seed=seed, dtype=torch.float64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    owner, rest = torch.tensor(owners), order[len(owners) :]
    merged = ClassStatistics(K, D, **options)
    for part in range(4):
        chosen = order[: len(owners)][owner == part]
        merged.merge_state(collect(features[chosen], labels[chosen], batch=1 + seed, **options))
    merged.merge_state(collect(features[rest], labels[rest], **options).metric_state)
    assert_same(merged.compute(), collect(features, labels, batch=len(labels), **options).compute(), rounding(options))


def test_merging_leaves_the_other_state_as_it_was_and_refreshes_a_computed_result():
    one, other = collect(FEATURES[:90], LABELS[:90]), collect(FEATURES[90:], LABELS[90:])
    before = copy.deepcopy(other.metric_state)
    stale = one.compute()
    one.merge_state(other)
    assert int(one.compute().counts.sum()) == len(LABELS) > int(stale.counts.sum())
    for name, value in before.items():
        assert torch.equal(other.metric_state[name], value), name


def test_statistics_of_another_kind_do_not_merge():
    weighted = ClassStatistics(2, 3, class_counts=[1, 2])
    for other in (ClassStatistics(2, 3), ClassStatistics(2, 3, class_counts=[2, 1])):
        with pytest.raises(ValueError, match="class_counts"):
            weighted.merge_state(other)


def test_forward_returns_the_batch_and_accumulates_the_whole(options):
    features = FEATURES.double()
    metric = ClassStatistics(K, D, **options)
    for h, y in zip(features.split(40), LABELS.split(40), strict=True):
        assert_same(metric(h, y), collect(h, y, **options).compute(), rounding(options))
    assert_same(metric.compute(), collect(features, LABELS, **options).compute(), rounding(options))


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_anchors_do_not_change_the_result(when, options):
    features = FEATURES.double()
    expected = collect(features, LABELS, **options).compute()
    anchors = expected.means + 0.1
    anchors[2] = torch.nan  # a class that last epoch did not have
    metric = ClassStatistics(K, D, **options)
    for moment, part in (("before", slice(0, 50)), ("between", slice(50, None)), ("after", slice(0, 0))):
        if when == moment:
            metric.set_anchors(anchors)
        metric.update(features[part], LABELS[part])
    assert_same(metric.compute(), expected, rounding(options))
    np.testing.assert_allclose(metric.anchor[1], anchors[1].float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_count_as_the_numbers_they_are(dtype):
    features = FEATURES.to(dtype)
    assert_same(collect(features, LABELS).compute(), collect(features.double(), LABELS).compute(), 1e-12)


class PrecisionOfProducts(TorchDispatchMode):
    """Notes which float32 precision is allowed at every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::mm", "aten::addmm")):
            self.seen += [torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_and_reduced_precision_products_change_nothing(dtype):
    # The flags themselves, too, as not every processor has the faster products to show a difference.
    def run():
        merged = collect(FEATURES[:90], LABELS[:90], scatter_dtype=dtype)
        merged.merge_state(collect(FEATURES[90:], LABELS[90:], scatter_dtype=dtype))
        return merged.compute()

    expected, before = run(), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16), PrecisionOfProducts() as products:
            actual = run()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same(actual, expected, 0)
    if dtype == torch.float32:
        assert "ieee" in products.seen
        assert products.seen.count("ieee") >= len(products.seen) - 2  # `compute` multiplies in float64


def test_update_never_waits_for_the_device(options):
    metric = ClassStatistics(K, D, **options)
    with HostReads() as reads:
        metric.update(FEATURES[:50], LABELS[:50])
        metric.set_anchors(FEATURES[:K].double())
        metric.update(FEATURES[50:], LABELS[50:])
    assert reads.seen == []
    # Meta tensors have no values: any look at one raises.
    metric.to("meta").update(FEATURES.to("meta"), LABELS.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_update_on_a_gpu_does_not_synchronise_and_agrees_with_the_cpu(options):
    metric, h, y = ClassStatistics(K, D, **options).to("cuda"), FEATURES.double().cuda(), LABELS.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(h[:50], y[:50])
        metric.update(h[50:], y[50:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = collect(FEATURES.double(), LABELS, **options).compute()
    assert_same(metric.to("cpu").compute(), expected, rounding(options))


def test_no_gradient_is_recorded_even_in_forward():
    features = FEATURES.clone().requires_grad_()
    metric = ClassStatistics(K, D)
    metric.update(features, LABELS)
    metric(features, LABELS)
    assert not any(state.requires_grad for state in metric.metric_state.values())


def test_inference_mode_may_come_and_go():
    metric = ClassStatistics(K, D)
    with torch.inference_mode():
        metric.reset()
        metric.update(FEATURES[:30] + 0, LABELS[:30])
        inner = FEATURES[30:60] + 0
    metric.update(inner, LABELS[30:60])
    with torch.inference_mode():
        metric.update(FEATURES[60:90] + 0, LABELS[60:90])
    metric.update(FEATURES[90:], LABELS[90:])
    assert_same(metric.compute(), collect(FEATURES, LABELS).compute())


def test_classes_without_samples_are_nan_and_single_samples_have_no_variance():
    moments = collect(*clusters(4, D, counts=[9, 0, 1, 5]), 4).compute()
    assert moments.counts.tolist() == [9, 0, 1, 5]
    assert moments.means.isnan().all(1).tolist() == [False, True, False, False]
    assert moments.variances.isnan().tolist() == [False, True, False, False]
    assert moments.variances[2] == 0
    assert moments.within.isfinite().all()


@pytest.mark.parametrize("bad", [[-1], [K], [K + 100, -100, -7]])
def test_labels_outside_the_range_are_counted_and_named_by_compute(bad):
    metric = collect(FEATURES, LABELS)
    metric.update(torch.randn(len(bad), D), torch.tensor(bad))
    metric.update(FEATURES, LABELS)
    with pytest.raises(ValueError, match=rf"^{len(bad)} labels lie outside \[0, {K}\)"):
        metric.compute()


def test_samples_of_a_class_declared_empty_are_an_error():
    metric = ClassStatistics(2, 3, class_counts=[4, 0])
    metric.update(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="empty"):
        metric.compute()


def test_wrong_shapes_dtypes_and_arguments_are_refused_at_the_border():
    metric = ClassStatistics(K, D)
    h, y = torch.zeros(3, D), torch.zeros(3, dtype=torch.long)
    for features, labels in ((h[:, 1:], y), (h[..., None], y), (h.long(), y), (h, y[1:]), (h, h[:, 0]), (h, y.bool())):
        with pytest.raises(ValueError, match="must be"):
            metric.update(features, labels)
    assert float(metric.count.sum()) == 0
    for wrong in ({"num_classes": 1}, {"feature_dim": 0}, {"scatter_dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"needs|is torch"):
            ClassStatistics(**{"num_classes": 3, "feature_dim": 4, **wrong})
    for counts in ([1, 2], [1, -1, 2], [0, 0, 0], [1, 2, math.nan]):
        with pytest.raises(ValueError, match="must be 3 non-negative numbers"):
            ClassStatistics(3, 4, class_counts=counts)


def test_labels_of_any_integer_type_count_and_an_empty_batch_adds_nothing():
    for dtype in (torch.uint8, torch.int32):
        metric = collect(FEATURES, LABELS.to(dtype))
        metric.update(FEATURES[:0], LABELS[:0])
        assert_same(metric.compute(), collect(FEATURES, LABELS).compute(), 0)


def test_a_checkpoint_continues_where_it_was_saved(options):
    metric = collect(FEATURES[:100], LABELS[:100], batch=25, **options)
    assert metric.state_dict() == {}
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    untouched = copy.deepcopy(saved)
    resumed = ClassStatistics(K, D, **options)
    resumed.load_state_dict(dict(saved))
    assert_same(resumed.compute(), metric.compute(), 0)
    for either in (resumed, metric):
        either.update(FEATURES[100:], LABELS[100:])
    assert_same(resumed.compute(), metric.compute(), 0)
    assert all(torch.equal(saved[name], untouched[name]) for name in saved)
    with pytest.raises(RuntimeError, match="size"):
        ClassStatistics(K, D + 1, **options).load_state_dict(dict(saved))


def test_a_collection_keeps_metrics_of_other_class_weights_apart():
    features, labels = torch.tensor([[0.0, 0.0], [5.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1, 0, 0])
    both = {"images": ClassStatistics(2, 2), "classes": ClassStatistics(2, 2, class_counts=[3, 1])}
    found, alone = MetricCollection(copy.deepcopy(both)), MetricCollection(both, compute_groups=False)
    for part in ([0, 1], [2, 3]):  # of the first batch neither has any scatter
        found.update(features[part], labels[part])
        alone.update(features[part], labels[part])
    for name, expected in alone.compute().items():
        torch.testing.assert_close(found.compute()[name].within, expected.within)
