import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from etflight.metrics import Reliability, TemperatureFit


def decisions(sharpness=1.0, n=997, num_classes=10):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(n, num_classes, generator=generator) * 2
    target = torch.multinomial(clean.softmax(1), 1, generator=generator).squeeze(1)
    return clean * sharpness, target


def reliability(logits, target):
    metric = Reliability()
    for part in (slice(0, 100), slice(100, None)):
        metric.update(logits[part], target[part])
    return metric.compute()


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 6.0])
def test_bins_equal_numpys_histograms(sharpness):
    logits, target = decisions(sharpness)
    bins = reliability(logits, target)
    confidence = logits.softmax(1).max(1).values.double().numpy()
    right = (logits.argmax(1) == target).double().numpy()
    edges = np.linspace(0, 1, 16)
    n, sums, hits = (np.histogram(confidence, edges, weights=w)[0] for w in (None, confidence, right))
    assert bins.counts.tolist() == n.tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(bins.confidence, sums / n, rtol=1e-6)
        np.testing.assert_allclose(bins.accuracy, hits / n, rtol=1e-12)
    assert bins.ece.item() == pytest.approx(np.abs(hits - sums).sum() / len(target), rel=1e-6)
    reference = multiclass_calibration_error(logits.softmax(1), target, num_classes=10, n_bins=15)
    assert bins.ece.item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_bin_holds_its_upper_edge_and_certainty_is_in_the_last():
    metric = Reliability(bins=2)
    metric.update(torch.tensor([[0.0, 0.0], [1e3, 0.0], [0.0, 1e-3]]), torch.tensor([0, 0, 0]))
    bins = metric.compute()
    assert bins.counts.tolist() == [1, 2]
    assert bins.accuracy.tolist() == [1, 0.5]


def test_of_nothing_the_error_is_not_a_number():
    assert Reliability().compute().ece.isnan()


@pytest.mark.parametrize(("sharpness", "scale"), [(1.0, 1.0), (0.05, 1.0), (6.0, 1.0), (1.0, 30.0)])
def test_temperature_minimises_the_likelihood(sharpness, scale):
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(4000, 10, generator=generator) * 2
    target = torch.multinomial(clean.softmax(1), 1, generator=generator).squeeze(1)
    logits = clean * sharpness * scale
    fit = TemperatureFit()
    fit.update(logits[:100], target[:100])
    fit.update(logits[100:], target[100:])
    best = minimize_scalar(
        lambda t: F.cross_entropy(logits.double() / t, target).item(),
        bounds=(0.004, 90),
        method="bounded",
        options={"xatol": 1e-9},
    ).x
    assert fit.compute().item() == pytest.approx(best, rel=5e-3)
