"""Accuracies, confusion and calibration, against scikit-learn, NumPy, SciPy and torchmetrics."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize_scalar
from sklearn.metrics import accuracy_score, confusion_matrix, precision_score, recall_score
from torchmetrics import MetricCollection
from torchmetrics.functional.classification import multiclass_calibration_error

from etflight.metrics import Confusion, Reliability, ShotAccuracy, TemperatureFit
from etflight.metrics.accuracy import shot_groups, third_groups
from etflight.metrics.evaluation import EvaluationMetrics
from etflight.utils.errors import UserError

# --- shots and confusion -----------------------------------------------------------------------------------------------


def decided():
    """Labels of 6 classes, and decisions for one of 7."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 6, (300,), generator=generator)
    return torch.where(torch.rand(300, generator=generator) < 0.6, target, (target + 1) % 7), target


def accuracies(num_classes, counts, predicted, target, shifts=()):
    metric = ShotAccuracy(num_classes, shifts)
    if counts is not None:
        metric.set_class_counts(torch.tensor(counts))
    for part in (slice(0, 7), slice(7, None)):
        metric.update(predicted[part], target[part])
    return {name: value.item() for name, value in metric.compute().items()}


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8], ids=str)
@pytest.mark.parametrize("metric", [partial(Confusion, 100), partial(ShotAccuracy, 100), Reliability, TemperatureFit])
def test_labels_of_any_integer_dtype_count_alike(metric, dtype):
    """With 100 classes the cells of a confusion are beyond the range of 8 bits."""
    logits, target = torch.randn(50, 100, generator=torch.Generator().manual_seed(0)), torch.arange(50) * 2 % 100
    results = []
    for labels in (target, target.to(dtype)):
        counted = metric()
        counted.update(logits, labels)
        results.append(counted.compute())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


def test_accuracies_equal_those_of_scikit_learn():
    predicted, target = decided()
    counts = [19, 500, 101, 100, 1, 20, 40]  # not sorted; class 6 is never seen
    recall = recall_score(target, predicted, labels=range(6), average=None)
    assert 0 < recall.min() < recall.max() < 1
    assert accuracies(7, counts, predicted, target) == pytest.approx(
        {
            "acc": np.mean(predicted.numpy() == target.numpy()),
            "acc_macro": recall.mean(),
            "acc_worst": recall.min(),
            "acc_harmonic": 6 / np.sum(1 / recall),
            "acc_many": recall[[1, 2]].mean(),
            "acc_medium": recall[[3, 5]].mean(),
            "acc_few": recall[[0, 4]].mean(),
            "acc_head": recall[[1, 2]].mean(),
            "acc_middle": recall[[3, 5]].mean(),  # and class 6, without samples
            "acc_tail": recall[[0, 4]].mean(),
        }
    )


def test_logits_count_as_their_decisions_and_counts_may_be_given_at_once():
    predicted, target = decided()
    counts = torch.tensor([19, 500, 101, 100, 1, 20, 40])
    logits = 3 * F.one_hot(predicted, 7) + torch.rand(300, 7, generator=torch.Generator().manual_seed(1))
    metric, confusion, of_decisions = ShotAccuracy(7, class_counts=counts), Confusion(7), Confusion(7)
    both = MetricCollection([metric, confusion], compute_groups=False)
    both.update(logits, target)
    of_decisions.update(predicted, target)
    result = {name: value.item() for name, value in metric.compute().items()}
    assert result == accuracies(7, counts.tolist(), predicted, target)
    assert torch.equal(confusion.compute(), of_decisions.compute())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers_decide_nothing_and_leave_no_accuracy_or_calibration_error(value):
    logits, target = torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0, 1, 2, 0])
    logits[3] = value  # argmax would take the first class, which is right
    shots, metrics = ShotAccuracy(3, (2,), class_counts=[500, 50, 5]), EvaluationMetrics(3, confusion=True)
    shots.update(logits, target)
    metrics.update(logits, target, torch.tensor(1.0))
    for values in (shots.compute(), metrics.compute()):
        assert {name for name, number in values.items() if not number.isnan()} == set()
    assert metrics.counts().classes.accuracy.isnan().all()
    assert shots.per_class().samples.tolist() == [2, 1, 1]


def test_scores_and_confusion_of_each_class_equal_those_of_scikit_learn():
    predicted, target = decided()
    metric, confusion = ShotAccuracy(8), Confusion(8)
    for part in (slice(0, 7), slice(7, None)):
        metric.update(predicted[part], target[part])
        confusion.update(predicted[part], target[part])
    scores = metric.per_class()
    truth = {"average": None, "labels": range(8), "zero_division": np.nan}
    assert scores.samples.tolist() == torch.bincount(target, minlength=8).tolist()
    np.testing.assert_allclose(scores.accuracy, recall_score(target, predicted, **truth))
    np.testing.assert_allclose(scores.precision, precision_score(target, predicted, **truth))
    assert confusion.compute().tolist() == confusion_matrix(target, predicted, labels=range(8)).tolist()


def test_without_counts_there_are_no_groups_and_a_class_never_right_makes_worst_and_harmonic_mean_zero():
    result = accuracies(3, None, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 2]))
    assert result == {"acc": 0.75, "acc_macro": pytest.approx(2 / 3), "acc_worst": 0, "acc_harmonic": 0}


def test_classes_of_one_size_have_neither_head_nor_tail():
    target = torch.arange(6) % 3
    equal, unequal = (accuracies(3, counts, target, target, shifts=(4,)) for counts in ([40] * 3, [40, 40, 39]))
    assert set(equal) == {"acc", "acc_macro", "acc_worst", "acc_harmonic", "acc_medium"}
    assert set(unequal) - set(equal) == {"acc_head", "acc_middle", "acc_tail", "acc_forward_4", "acc_backward_4"}


def test_without_any_images_accuracies_and_ece_are_nan_and_the_temperature_is_1():
    assert all(np.isnan(value) for value in accuracies(4, [9, 9, 9, 9], *torch.zeros(2, 0, dtype=torch.long)).values())
    assert Reliability().compute().ece.isnan()
    fit = TemperatureFit()
    assert (fit.compute().item(), fit.doubt) == (1.0, None)


@pytest.mark.parametrize(("num_classes", "sizes"), [(10, (3, 4, 3)), (9, (3, 3, 3)), (11, (3, 5, 3)), (2, (0, 2, 0))])
def test_thirds_are_equal_at_both_ends(num_classes, sizes):
    groups = third_groups(torch.randperm(num_classes))
    assert tuple(int(members.sum()) for members in groups.values()) == sizes


@given(st.lists(st.integers(0, 200), min_size=1, max_size=40))
def test_each_class_is_in_one_group_and_none_of_a_rarer_group_has_more_images(counts):
    counts = torch.tensor(counts)
    for groups in (shot_groups(counts), third_groups(counts)):
        assert torch.stack(list(groups.values())).sum(0).tolist() == [1] * len(counts)
        ordered = [counts[members] for members in groups.values() if members.any()]
        assert all(left.min() >= right.max() for left, right in pairwise(ordered))


def test_accuracy_under_another_prior_is_that_of_a_test_set_repeated_by_it():
    counts = [3, 300, 30]  # class 1 is the head, class 0 the tail
    target = torch.arange(3).repeat_interleave(8)
    predicted = torch.where(torch.arange(24) % 8 < torch.tensor([2, 5, 8])[target], target, (target + 1) % 3)
    result = accuracies(3, counts, predicted, target, shifts=(4, 100))
    for name, times in {"forward_4": [1, 4, 2], "backward_4": [4, 1, 2], "forward_100": [1, 100, 10]}.items():
        expected = accuracy_score(target, predicted, sample_weight=np.take(times, target))
        assert result[f"acc_{name}"] == pytest.approx(expected), name


# --- calibration -------------------------------------------------------------------------------------------------------


def guesses(sharpness=1.0, n=997):
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(n, 10, generator=generator) * 2
    target = torch.multinomial(clean.softmax(1), 1, generator=generator).squeeze(1)
    return clean * sharpness, target


@pytest.mark.parametrize("sharpness", [0.05, 1.0, 6.0])
def test_bins_equal_numpys_histograms(sharpness):
    logits, target = guesses(sharpness)
    metric = Reliability()
    for part in (slice(0, 100), slice(100, None)):
        metric.update(logits[part], target[part])
    bins = metric.compute()
    confidence = logits.softmax(1).max(1).values.double().numpy()
    right = (logits.argmax(1) == target).double().numpy()
    n, sums, hits = (np.histogram(confidence, np.linspace(0, 1, 16), weights=w)[0] for w in (None, confidence, right))
    assert bins.counts.tolist() == n.tolist()
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(bins.confidence, sums / n, rtol=1e-6)
        np.testing.assert_allclose(bins.accuracy, hits / n, rtol=1e-12)
    reference = multiclass_calibration_error(logits.softmax(1), target, num_classes=10, n_bins=15)
    assert bins.ece.item() == pytest.approx(reference.item(), rel=1e-5)


def test_a_bin_holds_its_upper_edge_and_certainty_is_in_the_last():
    metric = Reliability(bins=2)
    metric.update(torch.tensor([[0.0, 0.0], [1e3, 0.0], [0.0, 1e-3]]), torch.tensor([0, 0, 0]))
    bins = metric.compute()
    assert bins.counts.tolist() == [1, 2]
    assert bins.accuracy.tolist() == [1, 0.5]


def fitted(logits, target):
    fit = TemperatureFit()
    for part in (slice(0, 30), slice(30, None)):
        fit.update(logits[part], target[part])
    return fit.compute().item(), fit.doubt


@pytest.mark.parametrize("scale", [1.0, 0.05, 30.0])
def test_temperature_minimises_the_likelihood(scale):
    logits, target = guesses(scale, 4000)

    def loss(t):
        return F.cross_entropy(logits.double() / t, target).item()

    best = minimize_scalar(loss, bounds=(0.004, 90), method="bounded", options={"xatol": 1e-9}).x
    assert fitted(logits, target) == (pytest.approx(best, rel=5e-3), None)


@pytest.mark.parametrize(("images", "gap"), [(1, 3.0), (40, 30.0), (3000, 3.0)])
def test_when_every_decision_is_right_the_temperature_claims_no_more_than_as_many_images_show(images, gap):
    """A total loss of 1 is a mean confidence of about 1 - 1/N."""
    target = torch.arange(images) % 10
    logits = gap * F.one_hot(target, 10).float()
    least = brentq(lambda t: F.cross_entropy(logits.double() / t, target, reduction="sum").item() - 1, 1e-3, 1e3)
    temperature, doubt = fitted(logits, target)
    assert least / 1.11 < temperature <= least * 1.0001
    assert doubt == f"{images} held-out images are all classified correctly, so a lower one always fits better"


@pytest.mark.parametrize("value", [7.0, float("nan"), float("inf")])
def test_equal_logits_and_those_that_are_no_numbers_leave_the_temperature_at_1(value):
    doubt = "all temperatures suit 50 held-out images equally well"
    assert fitted(torch.full((50, 10), value), torch.arange(50) % 10) == (1, doubt)


@pytest.mark.parametrize(("scale", "edge"), [(-3.0, 100.0), (1e-4, 0.002)])
def test_a_temperature_beyond_the_range_is_doubted_and_taken_from_its_end(scale, edge):
    logits, target = guesses()
    temperature, doubt = fitted(scale * logits, target)
    assert temperature == pytest.approx(edge, rel=0.2)
    assert "997 held-out images need one beyond the range" in doubt


def test_huge_logits_have_a_temperature_that_is_a_number():
    logits, target = guesses()
    assert 0 < fitted(1e37 * logits, target)[0] <= 100.1


# --- what is no class is not counted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: Confusion(3), lambda: ShotAccuracy(3)], ids=["confusion", "shots"])
@pytest.mark.parametrize(("predicted", "target"), [(5, 0), (0, 5), (-1, 1), (1, -1), (0, -100)])
def test_a_class_out_of_range_is_never_counted_as_another(make, predicted, target):
    with pytest.raises(IndexError):
        make().update(torch.tensor([predicted, 0]), torch.tensor([target, 0]))
    with pytest.raises(UserError, match=r"logits .* for a metric of 3 classes"):
        make().update(torch.zeros(2, 5), torch.tensor([0, 1]))


@pytest.mark.parametrize("target", [-100, -1, 2])
def test_a_target_that_is_no_class_is_not_counted_as_wrong(target):
    with pytest.raises(IndexError):
        Reliability().update(torch.zeros(1, 2), torch.tensor([target]))


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_training_counts_come_in_any_form_and_fit_the_classes(kind):
    expected = accuracies(3, [500, 50, 5], torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    metric = ShotAccuracy(3, class_counts=kind([500, 50, 5]))
    metric.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]))
    assert {name: value.item() for name, value in metric.compute().items()} == expected
    with pytest.raises(UserError, match="one count for each of 3 classes"):
        ShotAccuracy(3, class_counts=kind([1, 2]))
