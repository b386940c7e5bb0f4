import math

import pytest
import torch
from torch.optim import SGD

from etflight.optim import WarmupCosine, WarmupMultiStep
from etflight.utils.errors import UserError


def rates(make, epochs):
    optimizer = SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    schedule = make(optimizer)
    seen = []
    for _ in range(epochs):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_cifar_protocol_epoch_by_epoch():
    def protocol(e):  # e from 1
        if e <= 5:
            return 0.1 * e / 5
        return 0.1 * (0.01 if e > 180 else 0.1 if e > 160 else 1)

    assert rates(WarmupMultiStep, 200) == pytest.approx([protocol(e) for e in range(1, 201)])


def test_cosine_after_a_warm_up_ends_near_zero():
    def protocol(e):
        return 0.1 * e / 5 if e <= 5 else 0.1 * 0.5 * (1 + math.cos(math.pi * (e - 6) / 15))

    assert rates(lambda o: WarmupCosine(o, total_epochs=20), 20) == pytest.approx([protocol(e) for e in range(1, 21)])


def test_warm_ups_that_are_longer_than_training_or_none():
    assert rates(lambda o: WarmupCosine(o, total_epochs=3), 3) == pytest.approx([0.02, 0.04, 0.06])
    for warmup in (0, 1):
        assert rates(lambda o, n=warmup: WarmupCosine(o, total_epochs=10, warmup_epochs=n), 1) == [0.1]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda o: WarmupCosine(o), "total_epochs=None"),
        (lambda o: WarmupCosine(o, total_epochs=-1), "total_epochs=-1"),
        (lambda o: WarmupMultiStep(o, milestones=[3]), "milestones"),
        (lambda o: WarmupCosine(o, total_epochs=5, warmup_epochs=-1), "negative"),
    ],
)
def test_invalid_schedules_are_refused(make, reason):
    with pytest.raises(UserError, match=reason):
        make(SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1))


def test_a_schedule_knows_that_it_ends_before_its_warm_up():
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert [WarmupCosine(optimizer, epochs).only_rises for epochs in (5, 6)] == [True, False]
