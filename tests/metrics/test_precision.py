"""Metrics in a network of half precision."""

from functools import partial

import pytest
import torch
from torch import nn

from etflight.metrics import ClassStatistics, ShotAccuracy
from etflight.metrics.accuracy import Reliability, SampleMean, TemperatureFit

METRICS = [SampleMean, partial(ShotAccuracy, 3), Reliability, TemperatureFit, partial(ClassStatistics, 3, 4)]


@pytest.mark.parametrize("make", METRICS, ids=lambda make: getattr(make, "func", make).__name__)
def test_a_metric_in_a_network_of_half_precision_keeps_its_dtypes(make):
    before = {name: state.dtype for name, state in make().metric_state.items()}
    network = nn.Sequential(make()).to(torch.bfloat16).half()
    assert {name: state.dtype for name, state in network[0].metric_state.items()} == before
    network[0].reset()
    assert {name: state.dtype for name, state in network[0].metric_state.items()} == before


@pytest.fixture
def half_precision():
    """What Lightning's plugin makes the default within the steps of a network in half precision."""
    yield lambda: torch.set_default_dtype(torch.bfloat16)
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("make", [Reliability, TemperatureFit])
def test_calibration_within_a_step_of_half_precision_is_that_of_float32(make, half_precision):
    logits, target = 3 * torch.randn(400, 3), torch.randint(3, (400,))
    expected, metric = make(), make()
    expected.update(logits, target)
    half_precision()
    metric.update(logits, target)
    for name, state in expected.metric_state.items():
        assert torch.equal(metric.metric_state[name], state), name
