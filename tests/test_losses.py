import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from etflight import CosineHead, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead
from etflight.errors import UserError

K, B = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(B, K, generator=GENERATOR, dtype=torch.float64).float()
TARGET = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # class 4 is absent
MIXED = 0.3 * F.one_hot(TARGET, K).float() + 0.7 * F.one_hot(TARGET.roll(1), K).float()
LOSSES = [DotRegressionLoss, CrossEntropyLoss]


def test_dot_regression_by_hand():
    z = torch.tensor([[0.5, 9.0], [7.0, -1.0]])
    # ((0.5 - 1)^2 / 2 + (-1 - 1)^2 / 2) / 2
    assert DotRegressionLoss()(z, torch.tensor([0, 1])).item() == pytest.approx((0.125 + 2.0) / 2)
    # length 4: (0.5 - 4)^2 / 8 and (-1 - 4)^2 / 8
    assert DotRegressionLoss(length=4.0)(z, torch.tensor([0, 1])).item() == pytest.approx((12.25 / 8 + 25 / 8) / 2)


def test_dot_regression_pulls_with_one_minus_cosine_and_pushes_nothing():
    w = F.normalize(torch.randn(K, 8, generator=GENERATOR), dim=1)
    h = F.normalize(torch.randn(1, 8, generator=GENERATOR), dim=1).requires_grad_()
    DotRegressionLoss()(h @ w.T, torch.tensor([2])).backward()
    assert_close(h.grad[0], -(1 - (h @ w[2])).detach() * w[2])


def test_cross_entropy_equals_torchs_with_and_without_smoothing_and_mixing():
    for smoothing in (0.0, 0.1):
        loss = CrossEntropyLoss(label_smoothing=smoothing)
        for target in (TARGET, MIXED):
            assert_close(loss(LOGITS, target), F.cross_entropy(LOGITS, target, label_smoothing=smoothing))


@pytest.mark.parametrize("make", LOSSES)
def test_a_mixup_pair_costs_the_mean_of_its_two_labels(make):
    loss = make()
    pair = 0.3 * loss.sample_losses(LOGITS, TARGET) + 0.7 * loss.sample_losses(LOGITS, TARGET.roll(1))
    assert_close(loss(LOGITS, MIXED), pair.mean())


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", ["none", "batch", "global"])
def test_one_hot_probabilities_cost_what_indices_cost(make, balance):
    loss = make(class_balance=balance)
    loss.set_class_counts(torch.tensor([60, 30, 20, 10, 1]))
    assert_close(loss(LOGITS, F.one_hot(TARGET, K).float()), loss(LOGITS, TARGET))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_batch_balance_weighs_each_sample_by_its_fair_share(make, exponent):
    loss = make(class_balance="batch", exponent=exponent)
    n = [6, 3, 2, 1]
    weights = torch.tensor([((B / 4) / n[y]) ** exponent for y in TARGET.tolist()])
    assert_close(loss(LOGITS, TARGET), (weights * loss.sample_losses(LOGITS, TARGET)).mean())


@pytest.mark.parametrize("make", LOSSES)
def test_batch_balance_of_mixed_targets_counts_probabilities(make):
    loss = make(class_balance="batch")
    n = MIXED.sum(0)
    weights = torch.where(n > 0, (B / (n > 0).sum()) / n, 0)
    expected = sum(
        MIXED[i, k] * weights[k] * loss.sample_losses(LOGITS[i : i + 1], torch.tensor([k]))[0]
        for i in range(B)
        for k in range(K)
    )
    assert_close(loss(LOGITS, MIXED), expected / B)


def test_batch_balanced_dot_regression_is_the_released_codes_loss():
    # scaling class vector k by sqrt((B/U)/n_k) gives 1/2 mean (B/U)/n_y (cos - 1)^2
    cosine = LOGITS.tanh()
    n = torch.tensor([6.0, 3, 2, 1])
    scale = ((B / 4) / n).sqrt()[TARGET]
    z = cosine[torch.arange(B), TARGET]
    released = 0.5 * ((z * scale - scale) ** 2).mean()
    assert_close(DotRegressionLoss(class_balance="batch")(cosine, TARGET), released)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, K - 1), min_size=2, max_size=40))
def test_batch_balance_gives_every_class_present_the_same_total_weight(labels):
    target = torch.tensor(labels)
    loss = DotRegressionLoss(class_balance="batch")
    weights = loss._class_weights(torch.bincount(target, minlength=K))
    present = torch.bincount(target, minlength=K) > 0
    totals = torch.bincount(target, minlength=K) * weights
    assert_close(totals[present], torch.full((int(present.sum()),), len(labels) / int(present.sum())))
    assert (totals[~present] == 0).all()


def test_global_balance_uses_the_training_counts():
    loss = CrossEntropyLoss(class_balance="global")
    counts = torch.tensor([60, 30, 20, 9, 1])
    loss.set_class_counts(counts)
    weights = (120 / (K * counts))[TARGET]
    assert_close(loss(LOGITS, TARGET), (weights * F.cross_entropy(LOGITS, TARGET, reduction="none")).mean())


def test_global_balance_without_counts_says_what_to_do():
    with pytest.raises(UserError, match="set_class_counts"):
        CrossEntropyLoss(class_balance="global")(LOGITS, TARGET)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", ["batch", "global"])
def test_in_eval_mode_the_loss_is_unweighted(make, balance):
    assert_close(make(class_balance=balance).eval()(LOGITS, TARGET), make()(LOGITS, TARGET))


@pytest.mark.parametrize("balance", ["none", "batch", "global"])
def test_from_target_logits_equals_the_loss_of_all_logits(balance):
    head = ETFHead(8, K).eval()
    features = torch.randn(B, 8, generator=GENERATOR)
    loss = DotRegressionLoss(class_balance=balance)
    if balance == "global":
        loss.set_class_counts(torch.tensor([60, 30, 20, 9, 1]))
    assert_close(loss.from_target_logits(head.target_logits(features, TARGET), TARGET), loss(head(features), TARGET))


def test_the_loss_is_computed_in_float32():
    assert DotRegressionLoss()(LOGITS.bfloat16(), TARGET).dtype == torch.float32


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("target", [TARGET, MIXED], ids=["indices", "probabilities"])
def test_gradients_are_those_of_finite_differences(make, target):
    loss = make(class_balance="batch")
    target = target.double() if target.is_floating_point() else target
    logits = LOGITS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss.sample_losses(z, target), (logits,))


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (ETFHead(8, K, learn_scale=True), "learn_scale"),
        (ETFHead(8, K, normalize=False), "normalize=True"),
        (ETFHead(8, K, scale=2.0), "length 1.0.*scale 2.0"),
        (LinearHead(8, K), "LinearHead"),
        (CosineHead(8, K), "CosineHead"),
    ],
)
def test_dot_regression_refuses_a_head_it_cannot_train(head, reason):
    with pytest.raises(UserError, match=reason):
        DotRegressionLoss().check_head(head)


def test_dot_regression_takes_a_head_of_its_own_length():
    DotRegressionLoss(length=2.0).check_head(ETFHead(8, K, scale=2.0))


@pytest.mark.parametrize(
    "bad",
    [
        *(partial(DotRegressionLoss, length=length) for length in (0, -1.0, math.nan, math.inf)),
        *(partial(CrossEntropyLoss, label_smoothing=smoothing) for smoothing in (1.0, -0.1, math.nan)),
        *(partial(make, exponent=exponent) for make in LOSSES for exponent in (-1, math.nan, math.inf)),
    ],
)
def test_bad_arguments_are_refused(bad):
    with pytest.raises(UserError):
        bad()


def _balanced_on_rank(rank, logits, target):
    logits = logits.requires_grad_()
    losses = {make.__name__: make(class_balance="batch")(logits, target).item() for make in LOSSES}
    loss = DotRegressionLoss(class_balance="batch")
    own = logits.gather(1, target[:, None]).squeeze(1)
    losses["from_target_logits"] = loss.from_target_logits(own, target, num_classes=K).item()
    with pytest.raises(UserError, match="give num_classes"):  # both processes, before either waits for the other
        loss.from_target_logits(own, target)
    evaluated = DotRegressionLoss(class_balance="batch").eval()
    if rank == 0:  # no collective call in eval: one rank alone must not wait for the other
        evaluated(logits, target)
    return losses


def test_batch_balance_counts_over_all_ranks(two_processes):
    parts = two_processes(_balanced_on_rank, [(LOGITS[:6], TARGET[:6]), (LOGITS[6:], TARGET[6:])])
    for name, make in [*((make.__name__, make) for make in LOSSES), ("from_target_logits", DotRegressionLoss)]:
        mean = sum(part[name] for part in parts) / 2
        assert mean == pytest.approx(make(class_balance="batch")(LOGITS, TARGET).item(), rel=1e-6)
