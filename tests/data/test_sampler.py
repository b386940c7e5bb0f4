from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from etflight.data import Digits, ImbalancedSampler
from etflight.data.sampler import POLICIES, ShardSampler
from etflight.utils.errors import UserError

COUNTS = np.array([400, 100, 30, 10])
LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))


def share(weights):
    return np.asarray(weights, dtype=float) / np.sum(weights)


EXPECTED = {
    "sqrt": share(COUNTS**0.5),
    "balanced": share(np.ones(4)),
    "effective": share([n * (1 - 0.9) / (1 - 0.9**n) for n in COUNTS.tolist()]),
    "reverse": share(400 / COUNTS),
    0.3: share(COUNTS**0.3),
    "0.3": share(COUNTS**0.3),
    "-1": share(1 / COUNTS),
    1.0: share(COUNTS),
}


@pytest.mark.parametrize("policy", EXPECTED, ids=repr)
def test_classes_are_drawn_with_the_policys_probabilities(policy):
    draws = 200_000
    sampler = ImbalancedSampler(LABELS, policy, beta=0.9, num_samples=draws)
    np.testing.assert_allclose(sampler.probabilities(), EXPECTED[policy], rtol=1e-12)
    seen = np.bincount(LABELS[list(sampler)], minlength=4)
    chi_square = ((seen - draws * EXPECTED[policy]) ** 2 / (draws * EXPECTED[policy])).sum()
    assert chi_square < 16.3  # 0.999 quantile, three degrees of freedom


def test_effective_lies_between_instance_and_balanced():
    instance, balanced = (ImbalancedSampler(LABELS, "effective", beta=b).probabilities() for b in (0, 1 - 1e-12))
    np.testing.assert_allclose(instance, share(COUNTS))
    np.testing.assert_allclose(balanced, share(np.ones(4)), rtol=1e-3)


def test_progressive_goes_from_instance_to_balanced():
    sampler = ImbalancedSampler(LABELS, "progressive", num_epochs=5)
    for epoch, t in enumerate([0, 0.25, 0.5, 0.75, 1.0]):
        sampler.set_epoch(epoch)
        np.testing.assert_allclose(sampler.probabilities(), (1 - t) * share(COUNTS) + t / 4)
    once = ImbalancedSampler(LABELS, "progressive", num_epochs=1)
    np.testing.assert_allclose(once.probabilities(), share(COUNTS))


def test_no_image_comes_again_before_all_others_of_its_class():
    drawn = np.array(list(ImbalancedSampler(LABELS, "balanced", num_samples=2000)))
    for k in range(4):
        walked = drawn[LABELS[drawn] == k]
        passes = [walked[i : i + COUNTS[k]] for i in range(0, len(walked), COUNTS[k])]
        assert all(len(set(one)) == len(one) for one in passes)
        assert all(one.tolist() != other.tolist() for one, other in pairwise(passes))


@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.sampled_from([*POLICIES, 0.7]),
    st.integers(1, 7),
    st.integers(1, 60),
    st.integers(0, 9),
)
def test_ranks_together_draw_exactly_what_one_process_draws(labels, policy, world_size, num_samples, epoch):
    options = {"num_samples": num_samples, "num_epochs": 10}
    alone = ImbalancedSampler(labels, policy, **options, num_replicas=1, rank=0)
    alone.set_epoch(epoch)
    draw = list(alone)
    for rank in range(world_size):
        shard = ImbalancedSampler(labels, policy, **options, num_replicas=world_size, rank=rank)
        shard.set_epoch(epoch)
        assert list(shard) == draw[rank::world_size]
        assert len(shard) == len(draw[rank::world_size])
    assert len(draw) == num_samples


def test_the_draw_is_a_function_of_seed_and_epoch_alone():
    def draw(seed, epoch):
        sampler = ImbalancedSampler(LABELS, "balanced", seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    again = ImbalancedSampler(LABELS, "balanced", seed=3)
    for epoch in range(3):  # earlier epochs leave no trace
        again.set_epoch(epoch)
        walked = list(again)
    assert walked == draw(3, 2)
    assert len({tuple(draw(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((LABELS, "balance"), {}, "give one of instance, sqrt, balanced"),
        ((LABELS, "nan"), {}, "finite"),
        ((LABELS, "progressive"), {}, "number of epochs"),
        ((LABELS, "effective"), {"beta": 1.0}, "beta"),
        ((LABELS,), {"num_samples": 0}, "num_samples"),
        ((LABELS,), {"seed": -1}, "seed is -1: give 0 or more"),
        ((LABELS,), {"num_replicas": 2, "rank": 2}, "Invalid rank 2"),
        (([],), {}, "no labels"),
    ],
)
def test_what_cannot_be_sampled_is_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        ImbalancedSampler(*arguments, **options)


@given(st.integers(1, 8), st.integers(8, 40))
def test_shards_hold_every_image_once_without_padding(world_size, length):
    shards = [ShardSampler(range(length), world_size, rank) for rank in range(world_size)]
    assert sorted(i for shard in shards for i in shard) == list(range(length))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]


def test_fewer_images_than_ranks_cannot_be_shared():
    with pytest.raises(UserError, match="2 images cannot be shared by 3 ranks"):
        ShardSampler(range(2), 3, 0)


def test_an_initialised_process_group_shards_without_being_told(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert list(ShardSampler(range(5))) == [1, 3]
    data = Digits()
    seen = torch.cat([labels for _, labels in data.test_dataloader()])
    assert torch.equal(seen, data.split("test").labels[1::2])


@pytest.mark.parametrize(("exponent", "drawn"), [(1e300, 0), (-1e300, 2)])
def test_an_extreme_exponent_draws_only_the_largest_or_the_smallest_class(exponent, drawn):
    sampler = ImbalancedSampler([0] * 10 + [4] * 3 + [7] * 2, exponent)  # labels may have gaps
    assert sampler.probabilities().tolist() == [float(k == drawn) for k in range(3)]


@pytest.mark.parametrize("labels", [np.eye(3)[[0, 1, 2, 0]], np.eye(3, dtype=int), ["cat", "dog"], [0.5, 1.0]], ids=str)
def test_what_is_not_one_integer_per_image_is_refused(labels):
    with pytest.raises(UserError, match="give one integer per training image"):
        ImbalancedSampler(labels)
