import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from etflight.metrics import ClassStatistics, measures
from tests.distributed import WorkerError
from tests.metrics.data import clusters

K, D = 7, 12
COUNTS = [60, 1, 0, 40, 33, 2, 90]
OPTIONS = {
    "scatter": ({}, 1e-10),
    "class-weighted": ({"class_counts": COUNTS}, 1e-10),
    "no scatter": ({"scatter": False}, 1e-10),
    "float32": ({"scatter_dtype": torch.float32}, 1e-5),
}
# Ranks with uneven shards, one of them with nothing; and one that holds whole classes alone (the last splits by class).
SHARDS = {2: [[70, 156], [226, 0], "class"], 3: [[20, 206, 0], [0, 1, 225], "class"]}
GATHERS = [name for name in dir(dist) if "gather" in name or "all_to_all" in name or "scatter" in name]


def shards(features, labels, sizes, world_size):
    if sizes == "class":
        return [(features[labels % world_size == r], labels[labels % world_size == r]) for r in range(world_size)]
    return list(zip(features.split(sizes), labels.split(sizes), strict=True))


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.numel = max(self.numel, value.untyped_storage().nbytes())
        return out


def measure(rank, features, labels, options, num_classes=K, far=False):
    """The moments and what synchronising them moved; every collective but the all-reduce raises."""

    def refuse(*args, **kwargs):
        raise AssertionError("gathered instead of reduced")

    moved = []
    all_reduce = dist.all_reduce

    def count(tensor, *args, **kwargs):
        assert args == () or args[0] == dist.ReduceOp.SUM
        assert kwargs.get("op", dist.ReduceOp.SUM) == dist.ReduceOp.SUM
        moved.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in GATHERS if callable(getattr(dist, n)) and n.islower()]:
            patch.setattr(dist, name, refuse)
        patch.setattr(dist, "all_reduce", count)
        metric = ClassStatistics(num_classes, features.shape[1], **options)
        if far and rank == 0:
            metric.set_anchors(torch.full((num_classes, features.shape[1]), 3.0))
        for h, y in zip(features.split(16), labels.split(16), strict=True):
            if len(y):
                metric.update(h, y)
        own = {name: state.clone() for name, state in metric.metric_state.items()}
        with LargestTensor() as largest:
            moments = metric.compute()
        restored = all(torch.equal(own[name], state) for name, state in metric.metric_state.items())
    return tuple(moments), moved, largest.numel, restored


def whole(features, labels, options):
    metric = ClassStatistics(K, D, **options)
    metric.update(features, labels)
    return metric.compute()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("split", [0, 1, 2])
@pytest.mark.parametrize(("pool", "world_size"), [("two_processes", 2), ("three_processes", 3)])
def test_uneven_ranks_equal_one_process_by_sums_alone(pool, world_size, split, name, request):
    options, tolerance = OPTIONS[name]
    features, labels = clusters(K, D, counts=COUNTS)
    parts = shards(features, labels, SHARDS[world_size][split], world_size)
    results = request.getfixturevalue(pool)(measure, [(*part, options) for part in parts])
    expected = whole(features, labels, options)
    for values, _, _, restored in results:
        assert restored, "a rank's own state has to be back after compute"
        for actual, wanted in zip(values, expected, strict=True):
            if isinstance(wanted, torch.Tensor):
                torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, equal_nan=True)
            else:
                assert actual == wanted
    for actual, first in zip(results[-1][0], results[0][0], strict=True):
        assert actual is None or isinstance(actual, bool) or torch.equal(actual.nan_to_num(), first.nan_to_num())


def test_tight_classes_keep_their_digits_over_ranks_with_different_anchors(three_processes):
    features, labels = clusters(K, D, spread=1e-6)
    parts = shards(features, labels, [100, 3, len(labels) - 103], 3)
    values, *_ = three_processes(measure, [(*part, {}) for part in parts])[1]
    actual = float(measures.nc1(whole(features, labels, {})._replace(means=values[1], within=values[3])))
    expected = float(measures.nc1(whole(features, labels, {})))
    assert expected < 1e-10
    assert abs(actual / expected - 1) < 1e-7


def test_anchors_set_on_one_rank_only_do_not_matter(two_processes):
    features, labels = clusters(K, D, counts=COUNTS)
    parts = shards(features, labels, [70, 156], 2)
    results = two_processes(measure, [(*part, {}, K, True) for part in parts])
    torch.testing.assert_close(results[0][0][3], whole(features, labels, {}).within, rtol=1e-10, atol=1e-10)


def test_traffic_and_memory_do_not_grow_with_the_number_of_ranks(two_processes, three_processes):
    features, labels = clusters(50, 64)
    costs = []
    for pool, n in ((two_processes, 2), (three_processes, 3)):
        per_rank = [(h, y, {}, 50) for h, y in shards(features, labels, "class", n)]
        costs.append([(sum(moved), largest) for _, moved, largest, _ in pool(measure, per_rank)])
    assert len(set(costs[0] + costs[1])) == 1
    traffic, largest = costs[0][0]
    assert traffic == 2 * 51 + 2 * 51 * 64 + 64 * 64  # counts, squares; anchors, shifts; the scatter
    assert largest == 64 * 64 * 8


def accumulate(rank, features, labels, options):
    metric = ClassStatistics(K, D, **options)
    half = len(labels) // 2
    metric.update(features[:half], labels[:half])
    metric.compute()
    metric.update(features[half:], labels[half:])
    return tuple(metric.compute())


def test_accumulating_on_after_compute_stays_right(two_processes):
    features, labels = clusters(K, D, counts=COUNTS)
    parts = shards(features, labels, [70, 156], 2)
    values = two_processes(accumulate, [(*part, {}) for part in parts])[1]
    torch.testing.assert_close(values[3], whole(features, labels, {}).within, rtol=1e-10, atol=1e-10)


def test_labels_out_of_range_on_one_rank_are_an_error_on_all(two_processes):
    features, labels = clusters(K, D, counts=COUNTS)
    labels[5] = K
    with pytest.raises(WorkerError) as error:
        two_processes(measure, [(*part, {}) for part in shards(features, labels, [70, 156], 2)])
    assert str(error.value).count(f"1 labels lie outside [0, {K})") == 2
