"""Wrong training labels, on purpose."""

import numpy as np
import pytest

from etflight.data import ClassSubset, Digits, ImbalancedSampler
from etflight.data.profiles import noisy_labels
from etflight.utils.errors import UserError

TRUE = Digits().split("train").labels.numpy()


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
@pytest.mark.parametrize("part", [0.2, 0.4])
def test_the_part_of_each_class_has_a_wrong_label(kind, part):
    noisy = Digits(label_noise=part, noise_kind=kind).split("train").labels.numpy()
    for k in range(10):
        assert (noisy[TRUE == k] != k).sum() == np.rint(part * (TRUE == k).sum())


def test_pair_noise_gives_the_next_class_and_symmetric_noise_each_other_class_alike():
    labels = np.repeat(np.arange(4), 3000)
    pair = noisy_labels(labels, 4, 0.5, "pair", 0)
    assert set(((pair - labels) % 4).tolist()) == {0, 1}
    symmetric = noisy_labels(labels, 4, 0.5, "symmetric", 0)
    steps = np.bincount((symmetric - labels) % 4, minlength=4)
    assert steps[0] == 6000
    assert (abs(steps[1:] - 2000) < 4 * np.sqrt(6000 * 2 / 9)).all()  # four standard deviations


def test_only_training_labels_are_wrong_and_the_seed_decides_which():
    data = Digits(label_noise=0.4, val_fraction=0.1)
    clean = Digits(val_fraction=0.1)
    for split in ("val", "test"):
        assert data.split(split).labels.equal(clean.split(split).labels)
    again = Digits(label_noise=0.4, val_fraction=0.1)
    other = Digits(label_noise=0.4, val_fraction=0.1, seed=1)
    assert data.split("train").labels.equal(again.split("train").labels)
    assert data.fingerprint == again.fingerprint != clean.fingerprint
    assert data.fingerprint != other.fingerprint


def test_the_training_knows_nothing_of_the_true_labels():
    data = Digits(label_noise=0.4, imbalance_ratio=10, sampler="balanced")
    noisy = data.split("train").labels.numpy()
    assert data.class_counts.tolist() == np.bincount(noisy, minlength=10).tolist()
    own, of_noisy = data.train_dataloader().sampler.draw(), ImbalancedSampler(noisy, "balanced").draw()
    of_true = ImbalancedSampler(data.split("train").source.labels, "balanced").draw()
    assert own.tolist() == of_noisy.tolist() != of_true.tolist()


def test_classes_of_another_set_can_have_wrong_labels_among_themselves():
    data = ClassSubset(Digits(), "5-9", label_noise=0.4, noise_kind="pair")
    assert set(data.split("train").labels.tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"label_noise": 1.0}, "label_noise is 1.0"), ({"noise_kind": "asymmetric"}, "give symmetric, pair")],
)
def test_invalid_label_noise_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        Digits(**options)
