import copy
import io
import itertools
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
from tests.metrics.data import clusters

K, D = 7, 12
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
            scale = float(e.double().nan_to_num().abs().max())
            torch.testing.assert_close(
                a, e, rtol=rtol, atol=rtol * scale, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", CONFIGS)
def test_moments_equal_the_two_pass_oracle(name):
    options = CONFIGS[name]
    features, labels = clusters(K, D)
    moments = collect(features, labels, **options).compute()
    expected = oracle.two_pass(features, labels, K, class_weighted="class_counts" in options)
    tolerance = 1e-5 if name == "float32" else 1e-12
    np.testing.assert_array_equal(moments.counts, expected.counts)
    np.testing.assert_allclose(moments.means, expected.means, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(moments.variances, expected.variances, rtol=tolerance)
    assert moments.counts.dtype == torch.int64
    assert moments.means.dtype == moments.variances.dtype == torch.float64
    if options.get("scatter", True):
        np.testing.assert_allclose(moments.within, expected.within, rtol=0, atol=tolerance * expected.within.max())
    else:
        assert moments.within is None


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-7), (torch.float32, 1e-5)])
@pytest.mark.parametrize(
    ("exponent", "offset"),
    # further from the origin, float32 features cannot be that tight
    [(exponent, 0.0) for exponent in range(14)] + [(exponent, 30.0) for exponent in range(12)],
)
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
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 173), max_size=6), seed=st.integers(0, 100))
def test_any_split_into_batches_and_any_order_give_the_same(name, cuts, seed):
    features, labels = clusters(K, D, dtype=torch.float64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    metric = ClassStatistics(K, D, **CONFIGS[name])
    bounds = [0, *sorted(cuts), len(labels)]
    for start, stop in itertools.pairwise(bounds):
        part = order[start:stop]
        metric.update(features[part], labels[part])
    whole = collect(features, labels, batch=len(labels), **CONFIGS[name])
    assert_same(metric.compute(), whole.compute(), rtol=2e-6 if name == "float32" else 1e-11)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(owners=st.lists(st.integers(0, 3), min_size=150, max_size=150), seed=st.integers(0, 100))
def test_merging_any_split_equals_the_whole(name, owners, seed):
    features, labels = clusters(K, D, seed=seed, dtype=torch.float64)
    owner = torch.tensor(owners)
    dealt = [(owner == p).nonzero().squeeze(1) for p in range(4)]
    parts = [collect(features[i], labels[i], **CONFIGS[name]) for i in dealt]
    merged = ClassStatistics(K, D, **CONFIGS[name])
    for part in parts:
        merged.merge_state(part)
    rest = collect(features[len(owner) :], labels[len(owner) :], **CONFIGS[name])
    merged.merge_state(rest.metric_state)
    assert_same(
        merged.compute(), collect(features, labels, **CONFIGS[name]).compute(), 2e-6 if name == "float32" else 1e-11
    )


def test_merging_leaves_the_other_state_as_it_was_and_refreshes_a_computed_result():
    features, labels = clusters(K, D)
    one, other = collect(features[:90], labels[:90]), collect(features[90:], labels[90:])
    before = copy.deepcopy(other.metric_state)
    stale = one.compute()
    one.merge_state(other)
    assert int(one.compute().counts.sum()) == len(labels) > int(stale.counts.sum())
    for name, value in before.items():
        assert torch.equal(other.metric_state[name], value), name


def test_statistics_with_other_class_weights_do_not_merge():
    weighted = ClassStatistics(2, 3, class_counts=[1, 2])
    with pytest.raises(ValueError, match="class_counts"):
        weighted.merge_state(ClassStatistics(2, 3))
    with pytest.raises(ValueError, match="class_counts"):
        weighted.merge_state(ClassStatistics(2, 3, class_counts=[2, 1]))
    with pytest.raises(ValueError, match="lacks outer"):
        ClassStatistics(2, 3).merge_state(ClassStatistics(2, 3, scatter=False))


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_returns_the_batch_and_accumulates_the_whole(name):
    features, labels = clusters(K, D, dtype=torch.float64)
    metric = ClassStatistics(K, D, **CONFIGS[name])
    rtol = 2e-6 if name == "float32" else 1e-11
    for h, y in zip(features.split(40), labels.split(40), strict=True):
        assert_same(metric(h, y), collect(h, y, **CONFIGS[name]).compute(), rtol)
    assert_same(metric.compute(), collect(features, labels, **CONFIGS[name]).compute(), rtol)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_anchors_do_not_change_the_result(when, name):
    features, labels = clusters(K, D, dtype=torch.float64)
    expected = collect(features, labels, **CONFIGS[name]).compute()
    anchors = expected.means + 0.1
    anchors[2] = torch.nan  # a class that last epoch did not have
    metric = ClassStatistics(K, D, **CONFIGS[name])
    if when == "before":
        metric.set_anchors(anchors)
    metric.update(features[:50], labels[:50])
    if when == "between":
        metric.set_anchors(anchors)
    metric.update(features[50:], labels[50:])
    if when == "after":
        metric.set_anchors(anchors)
    assert_same(metric.compute(), expected, 2e-6 if name == "float32" else 1e-11)
    np.testing.assert_allclose(metric.anchor[1], anchors[1].float())


def test_class_weighting_gives_every_class_the_same_say():
    counts = [200, 5, 40]
    features, labels = clusters(3, D, counts=counts, dtype=torch.float64)
    features[labels == 1] *= 3
    weighted = collect(features, labels, 3, class_counts=torch.tensor(counts)).compute()
    plain = collect(features, labels, 3).compute()
    assert weighted.within is not None
    assert plain.within is not None
    torch.testing.assert_close(weighted.within.trace(), weighted.variances.mean())
    torch.testing.assert_close(plain.within.trace(), (plain.variances * plain.counts / 245).sum())
    assert weighted.class_weighted
    assert not plain.class_weighted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_count_as_the_numbers_they_are(dtype):
    features, labels = clusters(K, D, dtype=dtype)
    assert_same(collect(features, labels).compute(), collect(features.double(), labels).compute(), 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_autocast_and_reduced_precision_products_change_nothing(name):
    features, labels = clusters(8, 300, counts=[64] * 8)
    options = {k: v for k, v in CONFIGS[name].items() if k != "class_counts"}

    def run():
        merged = collect(features[:256], labels[:256], 8, batch=128, **options)
        merged.merge_state(collect(features[256:], labels[256:], 8, batch=128, **options))
        return merged.compute()

    expected = run()
    legacy = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = run()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(legacy)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e) if isinstance(e, torch.Tensor) else a == e


class PrecisionOfProducts(TorchDispatchMode):
    """Notes which float32 precision is allowed at every matrix product."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().startswith(("aten::mm", "aten::addmm")):
            backends = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
            if all(hasattr(backend, "fp32_precision") for backend in backends):
                self.seen += [backend.fp32_precision for backend in backends]
            else:
                self.seen.append(torch.get_float32_matmul_precision())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_float32_products_are_full_ones_whatever_the_user_allows(precision):
    # The flags themselves, as not every processor has the faster products to show a difference.
    features, labels = clusters(K, D)
    legacy = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with PrecisionOfProducts() as products:
            metric = collect(features, labels, scatter_dtype=torch.float32)
            metric.merge_state(collect(features, labels, scatter_dtype=torch.float32))
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(legacy)
    assert len(products.seen) > 2
    assert set(products.seen) <= {"ieee", "highest"}


def test_reduced_precision_set_by_backend_is_restored():
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("torch before 2.9 has one switch for all")
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        collect(*clusters(K, D), scatter_dtype=torch.float32)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


class NoHostSync(TorchDispatchMode):
    """Refuses whatever must read values on the host: scalars, and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "unique", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        assert not any(name == word or name.startswith(("nonzero", "_unique")) for word in self.FORBIDDEN), name
        if name.startswith("index"):
            for indices in args:
                for index in indices if isinstance(indices, (list, tuple)) else []:
                    assert index is None or index.dtype != torch.bool, f"{name} with a mask"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CONFIGS)
def test_update_never_waits_for_the_device(name):
    features, labels = clusters(K, D)
    metric = ClassStatistics(K, D, **CONFIGS[name])
    with NoHostSync():
        metric.update(features[:50], labels[:50])
        metric.set_anchors(features[:K].double())
        metric.update(features[50:], labels[50:])
    # Meta tensors have no values: any look at one raises.
    metric.to("meta").update(features.to("meta"), labels.to("meta"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", CONFIGS)
def test_update_on_a_gpu_does_not_synchronise_and_agrees_with_the_cpu(name):
    features, labels = clusters(K, D, dtype=torch.float64)
    metric = ClassStatistics(K, D, **CONFIGS[name]).to("cuda")
    h, y = features.cuda(), labels.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metric.update(h[:50], y[:50])
        metric.update(h[50:], y[50:])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    moments = type(metric.compute())(*[x.cpu() if isinstance(x, torch.Tensor) else x for x in metric.compute()])
    assert_same(moments, collect(features, labels, **CONFIGS[name]).compute(), 2e-6 if name == "float32" else 1e-11)


def test_the_no_sync_guard_itself_notices_syncs():
    x = torch.arange(3.0)
    for act in (lambda: x[0].item(), lambda: x[x > 1], lambda: bool(x.sum()), lambda: torch.nonzero(x)):
        with pytest.raises(AssertionError), NoHostSync():
            act()


def test_no_gradient_is_recorded_even_in_forward():
    features, labels = clusters(K, D)
    features.requires_grad_()
    metric = ClassStatistics(K, D)
    metric.update(features, labels)
    metric(features, labels)
    assert not any(state.requires_grad for state in metric.metric_state.values())


def test_inference_mode_may_come_and_go():
    features, labels = clusters(K, D)
    metric = ClassStatistics(K, D)
    metric.update(features[:30], labels[:30])
    with torch.inference_mode():
        metric.update(features[30:60] + 0, labels[30:60])
    metric.update(features[60:], labels[60:])
    assert_same(metric.compute(), collect(features, labels).compute())
    with torch.inference_mode():
        metric.reset()
        metric.update(features[:30] + 0, labels[:30])
        inner = features[30:60] + 0
    metric.update(inner, labels[30:60])
    metric.update(features[60:], labels[60:])
    assert_same(metric.compute(), collect(features, labels).compute())


def test_classes_without_samples_are_nan_and_single_samples_have_no_variance():
    features, labels = clusters(4, D, counts=[9, 0, 1, 5])
    moments = collect(features, labels, 4).compute()
    assert moments.counts.tolist() == [9, 0, 1, 5]
    assert moments.means.isnan().all(1).tolist() == [False, True, False, False]
    assert moments.variances.isnan().tolist() == [False, True, False, False]
    assert moments.variances[2] == 0
    assert moments.within is not None
    assert moments.within.isfinite().all()


@pytest.mark.parametrize("bad", [[-1], [K], [K + 100, -100, -7]])
def test_labels_outside_the_range_are_counted_and_named_by_compute(bad):
    features, labels = clusters(K, D)
    metric = collect(features, labels)
    metric.update(torch.randn(len(bad), D), torch.tensor(bad))
    metric.update(features, labels)
    with pytest.raises(ValueError, match=rf"^{len(bad)} labels lie outside \[0, {K}\)"):
        metric.compute()


def test_samples_of_a_class_declared_empty_are_an_error():
    metric = ClassStatistics(2, 3, class_counts=[4, 0])
    metric.update(torch.randn(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="empty"):
        metric.compute()


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(3, D + 1), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, D, 1), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, D, dtype=torch.long), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, D), torch.zeros(2, dtype=torch.long)),
        (torch.zeros(3, D), torch.zeros(3, 1, dtype=torch.long)),
        (torch.zeros(3, D), torch.zeros(3)),
        (torch.zeros(3, D), torch.zeros(3, dtype=torch.bool)),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused_at_the_border(features, labels):
    metric = ClassStatistics(K, D)
    with pytest.raises(ValueError, match="must be"):
        metric.update(features, labels)
    assert float(metric.count.sum()) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_classes": 1},
        {"feature_dim": 0},
        {"scatter_dtype": torch.bfloat16},
        {"class_counts": [1, 2]},
        {"class_counts": [1, -1, 2]},
        {"class_counts": [0, 0, 0]},
    ],
)
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"needs|must|is torch"):
        ClassStatistics(**{"num_classes": 3, "feature_dim": 4, **arguments})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_integer_type_count(dtype):
    features, labels = clusters(K, D)
    assert_same(collect(features, labels.to(dtype)).compute(), collect(features, labels).compute())


def test_an_empty_batch_adds_nothing():
    features, labels = clusters(K, D)
    metric = collect(features, labels)
    metric.update(features[:0], labels[:0])
    assert_same(metric.compute(), collect(features, labels).compute(), 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_continues_where_it_was_saved(name):
    features, labels = clusters(K, D)
    metric = collect(features[:100], labels[:100], batch=25, **CONFIGS[name])
    assert metric.state_dict() == {}
    metric.persistent(True)
    file = io.BytesIO()
    torch.save(metric.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    untouched = copy.deepcopy(saved)
    resumed = ClassStatistics(K, D, **CONFIGS[name])
    resumed.load_state_dict(dict(saved))
    resumed.update(features[100:], labels[100:])
    metric.update(features[100:], labels[100:])
    assert_same(resumed.compute(), metric.compute(), 0)
    assert all(torch.equal(saved[name], untouched[name]) for name in saved)


def test_a_checkpoint_of_another_size_is_refused():
    metric = ClassStatistics(K, D)
    metric.persistent(True)
    with pytest.raises(RuntimeError, match="anchor is"):
        ClassStatistics(K, D + 1).load_state_dict(metric.state_dict())


def test_casting_the_module_around_it_keeps_the_precision():
    features, labels = clusters(K, D)
    holder = torch.nn.Module()
    holder.metric = ClassStatistics(K, D, class_counts=[20 + 3 * (k % 5) for k in range(K)])
    holder.to(torch.bfloat16).half()
    holder.metric.update(features, labels)
    assert_same(holder.metric.compute(), collect(features, labels, **CONFIGS["class-weighted"]).compute())


def test_reset_forgets_and_a_copy_is_independent():
    features, labels = clusters(K, D)
    metric = collect(features, labels)
    twin = copy.deepcopy(metric)
    metric.reset()
    metric.update(features[:40], labels[:40])
    assert_same(metric.compute(), collect(features[:40], labels[:40]).compute())
    assert_same(twin.compute(), collect(features, labels).compute())


def test_it_works_in_a_metric_collection():
    features, labels = clusters(K, D)
    collection = MetricCollection({"a": ClassStatistics(K, D), "b": ClassStatistics(K, D, scatter=False)})
    collection.update(features, labels)
    collection.update(features, labels)
    twice = torch.cat([features, features]), torch.cat([labels, labels])
    result = collection["a"].compute(), collection["b"].compute()
    assert_same(result[0], collect(*twice).compute())
    assert_same(result[1], collect(*twice, scatter=False).compute())


def test_memory_is_the_states_alone_and_does_not_grow_with_samples():
    metric = ClassStatistics(1000, 64)
    allowed = 1001 * (64 * (4 + 8) + 17) + 64 * 64 * 8

    def held():
        tensors = [*metric.metric_state.values(), *metric._defaults.values(), *metric.buffers()]
        return sum(t.untyped_storage().nbytes() for t in tensors)

    assert held() <= allowed + 100
    for _ in range(3):
        metric.update(torch.randn(500, 64), torch.randint(1000, (500,)))
    assert held() <= allowed + 100
    metric.reset()
    assert held() <= allowed + 100
