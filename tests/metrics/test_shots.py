from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, balanced_accuracy_score, precision_score, recall_score

from etflight.metrics import ShotAccuracy
from etflight.metrics.accuracy import harmonic_mean, shifted_accuracy, shot_groups, third_groups


def accuracies(num_classes, counts, predicted, target, shifts=()):
    metric = ShotAccuracy(num_classes, shifts)
    if counts is not None:
        metric.set_class_counts(torch.tensor(counts))
    for part in (slice(0, 7), slice(7, None)):
        metric.update(predicted[part], target[part])
    return {name: value.item() for name, value in metric.compute().items()}


def test_accuracies_equal_those_of_scikit_learn():
    counts = [19, 500, 101, 100, 1, 20, 40]  # not sorted; class 6 is never seen
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 6, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, target, (target + 1) % 7)
    result = accuracies(7, counts, predicted, target)
    recall = recall_score(target, predicted, labels=range(6), average=None)
    assert 0 < recall.min() < recall.max() < 1
    assert result == pytest.approx(
        {
            "acc": np.mean(predicted.numpy() == target.numpy()),
            "acc_macro": recall_score(target, predicted, labels=range(6), average="macro"),
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
    seen_by_both = predicted != 6
    assert accuracies(7, counts, predicted[seen_by_both], target[seen_by_both])["acc_macro"] == pytest.approx(
        balanced_accuracy_score(target[seen_by_both], predicted[seen_by_both])
    )


def test_a_class_that_is_never_right_makes_the_worst_and_the_harmonic_mean_zero():
    result = accuracies(3, None, torch.tensor([0, 0, 1, 1] * 3), torch.tensor([0, 0, 1, 0] * 3))
    assert result.keys() == {"acc", "acc_macro", "acc_worst", "acc_harmonic"}
    assert result["acc_worst"] == pytest.approx(2 / 3)
    result = accuracies(3, None, torch.tensor([0, 0, 1, 1] * 3), torch.tensor([0, 0, 1, 2] * 3))
    assert (result["acc_worst"], result["acc_harmonic"]) == (0, 0)


def test_of_nothing_nothing_is_known():
    assert all(np.isnan(value) for value in accuracies(4, [9, 9, 9, 9], *torch.zeros(2, 0, dtype=torch.long)).values())


@pytest.mark.parametrize(
    ("num_classes", "sizes"), [(10, (3, 4, 3)), (100, (33, 34, 33)), (9, (3, 3, 3)), (11, (3, 5, 3)), (2, (0, 2, 0))]
)
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


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=20))
def test_the_harmonic_mean_lies_between_the_worst_and_the_mean(accuracy):
    accuracy = torch.tensor([*accuracy, float("nan")], dtype=torch.float64)
    harmonic = harmonic_mean(accuracy).item()
    assert accuracy[:-1].min() - 1e-9 <= harmonic <= accuracy[:-1].mean() + 1e-9


def test_scores_of_each_class_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 6, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, target, (target + 1) % 7)
    metric = ShotAccuracy(8)
    metric.update(predicted, target)
    scores = metric.per_class()
    truth = {"average": None, "labels": range(8), "zero_division": np.nan}
    assert scores.samples.tolist() == torch.bincount(target, minlength=8).tolist()
    np.testing.assert_allclose(scores.accuracy, recall_score(target, predicted, **truth))
    np.testing.assert_allclose(scores.precision, precision_score(target, predicted, **truth))


def test_accuracy_under_another_prior_is_that_of_a_test_set_repeated_by_it():
    counts = [3, 300, 30]  # class 1 is the head, class 0 the tail
    target = torch.arange(3).repeat_interleave(8)
    predicted = torch.where(torch.arange(24) % 8 < torch.tensor([2, 5, 8])[target], target, (target + 1) % 3)
    result = accuracies(3, counts, predicted, target, shifts=(4, 100))
    for name, times in {
        "acc_forward_4": [1, 4, 2],
        "acc_backward_4": [4, 1, 2],
        "acc_forward_100": [1, 100, 10],
        "acc_backward_100": [100, 1, 10],
    }.items():
        assert result[name] == pytest.approx(accuracy_score(target, predicted, sample_weight=np.take(times, target))), (
            name
        )
    assert result["acc_forward_100"] != result["acc_backward_100"]


@given(st.lists(st.floats(0, 1) | st.just(float("nan")), min_size=1, max_size=20), st.data())
def test_a_shifted_accuracy_lies_between_those_of_classes_and_is_their_mean_without_a_shift(accuracy, data):
    counts = torch.tensor(data.draw(st.lists(st.integers(1, 99), min_size=len(accuracy), max_size=len(accuracy))))
    accuracy = torch.tensor(accuracy, dtype=torch.float64)
    torch.testing.assert_close(shifted_accuracy(accuracy, counts, 1), accuracy.nanmean(), equal_nan=True)
    shifted = shifted_accuracy(accuracy, counts, data.draw(st.sampled_from([50, 1 / 50])))
    seen = accuracy[~accuracy.isnan()]
    assert len(seen) == 0 or seen.min() - 1e-9 <= shifted <= seen.max() + 1e-9
