import pytest
import torch
import torch.distributed as dist

from etflight.metrics import Confusion, Reliability, ShotAccuracy, TemperatureFit
from etflight.metrics.accuracy import SampleMean

K = 10
COUNTS = torch.arange(K) * 13 + 1


def samples(n=331):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, K - 1, (n,), generator=generator)
    return torch.randn(n, K, generator=generator) + 2 * torch.eye(K)[target], target


def measure(rank, logits, target):
    """All that is summed over samples, and again what stays of this process's own."""
    shots = ShotAccuracy(K, shifts=(2, 50))
    shots.set_class_counts(COUNTS)
    metrics = (shots, Confusion(K), Reliability(), TemperatureFit(), SampleMean())
    for z, y in zip(logits.split(16), target.split(16), strict=True):
        if len(y):
            for metric in metrics[:2]:
                metric.update(z.argmax(1), y)
            for metric in metrics[2:4]:
                metric.update(z, y)
            metrics[4].update(torch.nn.functional.cross_entropy(z, y), len(y))
    own = [{name: state.clone() for name, state in metric.metric_state.items()} for metric in metrics]
    results = [shots.per_class(), *(metric.compute() for metric in metrics)]
    for metric, before in zip(metrics, own, strict=True):
        assert all(torch.equal(before[name], state) for name, state in metric.metric_state.items())
    return results


def refusing(rank, logits, target):
    def refuse(*args, **kwargs):
        raise AssertionError("gathered instead of reduced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", refuse)
        return measure(rank, logits, target)


@pytest.mark.parametrize("sizes", [[166, 165], [17, 314], [331, 0]])
def test_two_processes_count_what_one_does(two_ready_processes, sizes):
    logits, target = samples()
    parts = two_ready_processes(refusing, list(zip(logits.split(sizes), target.split(sizes), strict=True)))
    for part in parts:
        torch.testing.assert_close(part, measure(0, logits, target), rtol=1e-6, atol=0, equal_nan=True)
