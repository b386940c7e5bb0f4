import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import brentq, minimize_scalar
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
    assert fit.doubt is None


def fitted(logits, target):
    fit = TemperatureFit()
    fit.update(logits, target)
    return fit.compute().item(), fit.doubt


@pytest.mark.parametrize(("images", "gap"), [(1, 3.0), (40, 0.3), (40, 30.0), (3000, 3.0)])
def test_when_every_decision_is_right_the_temperature_claims_no_more_than_as_many_images_show(images, gap):
    """A total loss of 1 is a mean confidence of about 1 - 1/N."""
    target = torch.arange(images) % 10
    logits = gap * F.one_hot(target, 10).float()
    least = brentq(lambda t: F.cross_entropy(logits.double() / t, target, reduction="sum").item() - 1, 1e-3, 1e3)
    temperature, doubt = fitted(logits, target)
    assert least / 1.11 < temperature <= least * 1.0001
    assert doubt == f"{images} held-out images are right and would have it fall for ever"


@pytest.mark.parametrize("value", [0.0, 7.0, float("nan"), float("inf")])
def test_equal_logits_and_those_that_are_no_numbers_leave_the_temperature_at_1(value):
    temperature, doubt = fitted(torch.full((50, 10), value), torch.arange(50) % 10)
    assert temperature == 1
    assert doubt == "to 50 held-out images all are alike"


@pytest.mark.parametrize(("scale", "edge"), [(-3.0, 100.0), (1e-4, 0.002)])
def test_a_temperature_beyond_the_range_is_doubted_and_taken_from_its_end(scale, edge):
    logits, target = decisions()
    temperature, doubt = fitted(scale * logits, target)
    assert temperature == pytest.approx(edge, rel=0.2)
    assert "997 held-out images ask for one beyond the range" in doubt


@pytest.mark.parametrize("size", [1e30, 1e37])
def test_huge_logits_have_a_temperature_that_is_a_number(size):
    logits, target = decisions()
    assert 0 < fitted(size * logits, target)[0] <= 100.1


def test_of_nothing_the_temperature_is_1_and_nobody_doubts_it():
    fit = TemperatureFit()
    assert (fit.compute().item(), fit.doubt) == (1.0, None)
