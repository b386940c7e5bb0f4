"""What several processes have seen, added by all-reduces: each number equals that of one process."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from etflight.metrics import ClassStatistics, Confusion, Reliability, ShotAccuracy, TemperatureFit, measures
from etflight.metrics.accuracy import SampleMean
from tests.metrics.oracle import clusters
from tests.tensors import LargestTensor

K, D = 7, 12
COUNTS = [60, 1, 0, 40, 33, 2, 90]
GATHERS = [name for name in dir(dist) if name.islower() and ("gather" in name or "all_to_all" in name)]


def refuse(*args, **kwargs):
    raise AssertionError("gathered instead of reduced")


def on_this_rank(rank, features, labels, options, far=False):
    """The moments, what synchronising them moved, and the largest tensor it made; every collective but the all-reduce raises."""
    moved, all_reduce = [], dist.all_reduce

    def count(tensor, *args, **kwargs):
        moved.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in GATHERS:
            patch.setattr(dist, name, refuse)
        patch.setattr(dist, "all_reduce", count)
        metric = ClassStatistics(K, features.shape[1], **options)
        if far and rank == 0:
            metric.set_anchors(torch.full((K, features.shape[1]), 3.0))
        half = len(labels) // 2
        metric.update(features[:half], labels[:half])
        metric.compute()
        metric.update(features[half:], labels[half:])
        own = {name: state.clone() for name, state in metric.metric_state.items()}
        moved.clear()
        with LargestTensor() as largest:
            moments = metric.compute()
    assert all(torch.equal(own[name], state) for name, state in metric.metric_state.items()), "its own states are back"
    return moments, sum(moved), largest.nbytes


def collect(features, labels, options):
    metric = ClassStatistics(K, D, **options)
    metric.update(features, labels)
    return metric.compute()


def on_two(pool, features, labels, shares, options, far=False):
    parts = [(features[share], labels[share], options, far) for share in shares]
    (first, traffic, largest), (second, *_) = pool(on_this_rank, parts)
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)
    return first, traffic, largest


@pytest.mark.parametrize("split", ["uneven", "one has nothing", "by class"])
@pytest.mark.parametrize(
    "options", [{}, {"class_counts": COUNTS}, {"scatter": False}, {"scatter_dtype": torch.float32}]
)
def test_statistics_of_two_uneven_processes_equal_those_of_one_by_sums_alone(two_ready_processes, split, options):
    features, labels = clusters(K, D, counts=COUNTS)
    size = {"uneven": 70, "one has nothing": len(labels), "by class": None}[split]
    first = torch.arange(len(labels)) < size if size else labels % 2 == 0
    far = "scatter_dtype" not in options  # far anchors take digits from float32 sums
    both, traffic, largest = on_two(two_ready_processes, features, labels, [first, ~first], options, far)
    tolerance = 1e-5 if "scatter_dtype" in options else 1e-10
    torch.testing.assert_close(both, collect(features, labels, options), rtol=tolerance, atol=tolerance, equal_nan=True)
    if options == {}:
        # counts and squares, anchors and shifts, the scatter, whatever the number of processes; no tensor is larger than a state
        assert traffic == 2 * (K + 1) + 2 * (K + 1) * D + D * D
        assert largest <= max(D * D, (K + 1) * D) * 8


def test_tight_classes_keep_their_digits_over_processes_with_different_anchors(two_ready_processes):
    features, labels = clusters(K, D, spread=1e-6)
    share = torch.arange(len(labels)) < 100
    both, *_ = on_two(two_ready_processes, features, labels, [share, ~share], {})
    expected = float(measures.nc1(collect(features, labels, {})))
    assert expected < 1e-10
    assert abs(float(measures.nc1(both)) / expected - 1) < 1e-7


def refused_on_this_rank(rank, features, labels):
    with pytest.raises(ValueError, match=rf"1 labels lie outside \[0, {K}\)"):
        on_this_rank(rank, features, labels, {})


def test_labels_out_of_range_on_one_process_are_an_error_on_all(two_ready_processes):
    features, labels = clusters(K, D)
    labels[-1] = K
    two_ready_processes(refused_on_this_rank, list(zip(features.chunk(2), labels.chunk(2), strict=True)))


def measure(rank, logits, target):
    """All that is summed over samples, without a gather; each process keeps its own states."""
    shots = ShotAccuracy(10, shifts=(2, 50))
    shots.set_class_counts(torch.arange(10) * 13 + 1)
    metrics = (shots, Confusion(10), Reliability(), TemperatureFit(), SampleMean())
    for z, y in zip(logits.split(16), target.split(16), strict=True):
        if len(y):
            inputs = (z.argmax(1), y), (z.argmax(1), y), (z, y), (z, y), (F.cross_entropy(z, y), len(y))
            for metric, values in zip(metrics, inputs, strict=True):
                metric.update(*values)
    own = [{name: state.clone() for name, state in metric.metric_state.items()} for metric in metrics]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", refuse)
        results = [shots.per_class(), *(metric.compute() for metric in metrics)]
    for metric, before in zip(metrics, own, strict=True):
        assert all(torch.equal(before[name], state) for name, state in metric.metric_state.items())
    return results


@pytest.mark.parametrize("first", [17, 331])
def test_two_processes_count_what_one_does(two_ready_processes, first):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 9, (331,), generator=generator)
    logits = torch.randn(331, 10, generator=generator) + 2 * torch.eye(10)[target]
    sizes = [first, 331 - first]
    parts = two_ready_processes(measure, list(zip(logits.split(sizes), target.split(sizes), strict=True)))
    whole = measure(0, logits, target)
    assert whole[-1] == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)
    for part in parts:
        torch.testing.assert_close(part, whole, rtol=1e-6, atol=0, equal_nan=True)
