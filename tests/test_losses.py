import inspect
import math
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from etflight import (
    CosineHead,
    CrossEntropyLoss,
    DotRegressionLoss,
    ETFHead,
    FocalLoss,
    LabelAwareSmoothingLoss,
    LDAMLoss,
    LinearHead,
    LogitAdjustedLoss,
)
from etflight.utils.errors import UserError

K, B = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(B, K, generator=GENERATOR, dtype=torch.float64).float()
TARGET = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # class 4 is absent
MIXED = 0.3 * F.one_hot(TARGET, K).float() + 0.7 * F.one_hot(TARGET.roll(1), K).float()
COUNTS = torch.tensor([60, 30, 20, 10, 1])
COUNTING = [LDAMLoss, LogitAdjustedLoss, LabelAwareSmoothingLoss]  # need the training counts
LOSSES = [DotRegressionLoss, CrossEntropyLoss, FocalLoss, *COUNTING]
BALANCES = ["none", "batch", "global", "effective"]


def counted(loss, counts=COUNTS):
    loss.set_class_counts(torch.as_tensor(counts))
    return loss


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
    loss = counted(make())
    pair = 0.3 * loss.sample_losses(LOGITS, TARGET) + 0.7 * loss.sample_losses(LOGITS, TARGET.roll(1))
    assert_close(loss(LOGITS, MIXED), pair.mean())


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", BALANCES)
def test_one_hot_probabilities_cost_what_indices_cost(make, balance):
    loss = counted(make(class_balance=balance))
    assert_close(loss(LOGITS, F.one_hot(TARGET, K).float()), loss(LOGITS, TARGET))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_batch_balance_weighs_each_sample_by_its_fair_share(make, exponent):
    loss = counted(make(class_balance="batch", exponent=exponent))
    n = [6, 3, 2, 1]
    weights = torch.tensor([((B / 4) / n[y]) ** exponent for y in TARGET.tolist()])
    assert_close(loss(LOGITS, TARGET), (weights * loss.sample_losses(LOGITS, TARGET)).mean())


@pytest.mark.parametrize("make", LOSSES)
def test_batch_balance_of_mixed_targets_counts_probabilities(make):
    loss = counted(make(class_balance="batch"))
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


def test_effective_balance_by_hand():
    # β = 1/2: (1 - 1/2)/(1 - 1/4) = 2/3 for two images, (1/2)/(1/2) = 1 for one; times 2/(2/3 + 1): 0.8 and 1.2
    loss = counted(CrossEntropyLoss(class_balance="effective", beta=0.5), [2, 1])
    z = torch.zeros(1, 2)
    assert loss(z, torch.tensor([0])).item() == pytest.approx(0.8 * math.log(2))
    assert loss(z, torch.tensor([1])).item() == pytest.approx(1.2 * math.log(2))


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 2**-40])
@pytest.mark.parametrize("counts", [[60, 30, 20, 10, 1], [10**7, 10**6, 500, 2, 1]])
def test_effective_balance_is_the_inverse_effective_number_normalised_to_sum_k(beta, counts):
    loss = counted(CrossEntropyLoss(class_balance="effective", beta=beta), counts)
    weights = loss._class_weights(torch.zeros(K))
    # in double, of geometric sums: 1 + β + … + β^(n-1) is the effective number
    n = np.array(counts, dtype=np.float64)
    effective = -np.expm1(n * np.log1p(beta - 1)) / (1 - beta) if beta else np.ones(K)
    expected = 1 / effective * K / (1 / effective).sum()
    assert_close(weights.double(), torch.from_numpy(expected), rtol=1e-5, atol=0)
    assert weights.sum().item() == pytest.approx(K)


def effective_weights(counts, beta=0.9999):
    """As the code of LDAM-DRW writes them."""
    weights = (1 - beta) / (1 - np.power(beta, np.asarray(counts, dtype=np.float64)))
    return torch.from_numpy(weights / weights.sum() * len(weights)).float()


def test_renormalized_weights_are_those_of_torchs_cross_entropy():
    loss = counted(CrossEntropyLoss(class_balance="effective", renormalize=True))
    assert_close(loss(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET, weight=effective_weights(COUNTS)))


def test_renormalized_ldam_is_the_loss_of_the_released_code():
    cosine = LOGITS.tanh().requires_grad_()
    margins = COUNTS**-0.25 / (COUNTS**-0.25).max() * 0.5
    pulled = torch.where(F.one_hot(TARGET, K).bool(), cosine - margins, cosine)
    released = F.cross_entropy(30 * pulled, TARGET, weight=effective_weights(COUNTS))
    ours = counted(LDAMLoss(class_balance="effective", renormalize=True))(30 * cosine, TARGET)
    assert_close(ours, released)
    assert_close(*(torch.autograd.grad(loss, cosine)[0] for loss in (ours, released)))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", BALANCES)
def test_renormalized_weights_have_a_mean_of_one_over_the_step(make, balance):
    loss, plain = counted(make(class_balance=balance, renormalize=True)), counted(make(class_balance=balance))
    weights = torch.ones(K) if balance == "none" else plain._class_weights(torch.bincount(TARGET, minlength=K))
    w = weights[TARGET]
    assert_close(loss(LOGITS, TARGET), (w * loss.sample_losses(LOGITS, TARGET)).sum() / w.sum())
    costs = torch.stack([loss.sample_losses(LOGITS, torch.full((B,), k)) for k in range(K)], dim=1)
    weights = torch.ones(K) if balance == "none" else plain._class_weights(MIXED.sum(0))
    shares = MIXED * weights
    assert_close(loss(LOGITS, MIXED), (shares * costs).sum() / shares.sum())


def test_a_class_without_training_images_leaves_the_other_weights_finite():
    loss = counted(CrossEntropyLoss(class_balance="effective"), [60, 30, 20, 10, 0])
    assert torch.isfinite(loss(LOGITS, TARGET))
    assert loss._class_weights(torch.zeros(K)).sum().item() == pytest.approx(K)


@pytest.mark.parametrize(
    "loss",
    [
        *(CrossEntropyLoss(class_balance=balance) for balance in ("global", "effective")),
        *(make() for make in COUNTING),
    ],
    ids=repr,
)
def test_a_loss_that_needs_counts_says_what_to_do_without_them(loss):
    with pytest.raises(UserError, match=f"{type(loss).__name__}.*set_class_counts"):
        loss(LOGITS, TARGET)
    with pytest.raises(UserError, match="no class has a training image"):
        loss.set_class_counts(torch.zeros(K))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", BALANCES)
def test_in_eval_mode_the_loss_is_unweighted_and_needs_no_counts(make, balance):
    plain = make() if make is DotRegressionLoss or make is FocalLoss else CrossEntropyLoss()
    assert_close(make(class_balance=balance).eval()(LOGITS, TARGET), plain(LOGITS, TARGET))
    assert_close(make(class_balance=balance).eval()(LOGITS, MIXED), plain(LOGITS, MIXED))


@pytest.mark.parametrize("balance", BALANCES)
def test_from_target_logits_equals_the_loss_of_all_logits(balance):
    head = ETFHead(8, K).eval()
    features = torch.randn(B, 8, generator=GENERATOR)
    loss = DotRegressionLoss(class_balance=balance)
    if balance in ("global", "effective"):
        counted(loss)
    assert_close(loss.from_target_logits(head.target_logits(features, TARGET), TARGET), loss(head(features), TARGET))


@pytest.mark.parametrize("make", LOSSES)
def test_the_loss_is_computed_in_float32(make):
    loss = counted(make())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(LOGITS.bfloat16(), TARGET)
    assert value.dtype == torch.float32
    assert_close(value, loss(LOGITS.bfloat16().float(), TARGET), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("target", [TARGET, MIXED], ids=["indices", "probabilities"])
def test_gradients_are_those_of_finite_differences(make, target):
    loss = counted(make(class_balance="batch"))
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


# --- focal, margins, adjusted logits, label-aware smoothing ----------------------------------------------------------------


def numpy_log_softmax(z):
    z = np.asarray(z, dtype=np.float64)
    return z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def numpy_focal(z, gamma=2.0):
    log_p = numpy_log_softmax(z)
    return -((1 - np.exp(log_p)) ** gamma) * log_p


def numpy_ldam(z, n, max_margin=0.5, scale=30.0):
    margins = n**-0.25 * (max_margin / (n**-0.25).max())
    return np.stack([-numpy_log_softmax(z - scale * margins * np.eye(len(n))[k])[:, k] for k in range(len(n))], axis=1)


def numpy_adjusted(z, n, tau=1.0):
    return -numpy_log_softmax(z + tau * np.log(n / n.sum()))


def numpy_label_aware(z, n, head=0.3, tail=0.0, shape="concave"):
    log_p, spread = numpy_log_softmax(z), n.max() - n.min()
    smoothing = {  # as in the authors' code
        "concave": tail + (head - tail) * np.sin((n - n.min()) * np.pi / (2 * spread)),
        "linear": tail + (head - tail) * (n - n.min()) / spread,
        "convex": head + (head - tail) * np.sin(1.5 * np.pi + (n - n.min()) * np.pi / (2 * spread)),
    }[shape]
    return -(1 - smoothing) * log_p - smoothing * log_p.mean(1, keepdims=True)


N = COUNTS.double().numpy()
ORACLES = {  # the loss, and by class and sample what it costs
    "focal": (FocalLoss(), numpy_focal),
    "focal, gamma 0.5": (FocalLoss(gamma=0.5), partial(numpy_focal, gamma=0.5)),
    "margins": (LDAMLoss(), partial(numpy_ldam, n=N)),
    "other margins": (LDAMLoss(max_margin=0.2, scale=4.0), partial(numpy_ldam, n=N, max_margin=0.2, scale=4.0)),
    "balanced softmax": (LogitAdjustedLoss(), partial(numpy_adjusted, n=N)),
    "adjusted by half": (LogitAdjustedLoss(tau=0.5), partial(numpy_adjusted, n=N, tau=0.5)),
    **{
        f"smoothed, {shape}": (
            LabelAwareSmoothingLoss(head_smoothing=0.4, tail_smoothing=0.1, shape=shape),
            partial(numpy_label_aware, n=N, head=0.4, tail=0.1, shape=shape),
        )
        for shape in ("concave", "linear", "convex")
    },
}


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_loss_is_its_equation_in_numpy(name, spread):
    loss, oracle = ORACLES[name]
    costs = torch.from_numpy(oracle(spread * LOGITS.double().numpy())).float()
    assert_close(counted(loss)(spread * LOGITS, TARGET), costs.gather(1, TARGET[:, None]).mean(), rtol=1e-5, atol=1e-6)
    assert_close(loss(spread * LOGITS, MIXED), (MIXED * costs).sum(1).mean(), rtol=1e-5, atol=1e-6)


def test_focal_loss_by_hand():
    # logits 0 and log 3: p = 1/4 and 3/4; (1 - 1/4)^2 log 4 = 0.7798, (1 - 3/4)^2 log(4/3) = 0.01798
    z = torch.tensor([[0.0, math.log(3)]])
    assert FocalLoss()(z, torch.tensor([0])).item() == pytest.approx(0.77979, abs=1e-5)
    assert FocalLoss()(z, torch.tensor([1])).item() == pytest.approx(0.01798, abs=1e-5)


def test_ldam_by_hand():
    # counts 16 and 1: margins 0.5/2 and 0.5; scale 4 and equal cosines: log(1 + e^1) and log(1 + e^2)
    loss = counted(LDAMLoss(scale=4.0), [16, 1])
    assert loss(torch.zeros(1, 2), torch.tensor([0])).item() == pytest.approx(1.31326, abs=1e-5)
    assert loss(torch.zeros(1, 2), torch.tensor([1])).item() == pytest.approx(2.12693, abs=1e-5)


def test_logit_adjustment_by_hand():
    # counts 3 and 1 of 4, equal logits: the softmax is (3/4, 1/4), squared frequencies at τ = 2 give (9/10, 1/10)
    z, tail = torch.zeros(1, 2), torch.tensor([1])
    assert counted(LogitAdjustedLoss(), [3, 1])(z, tail).item() == pytest.approx(math.log(4))
    assert counted(LogitAdjustedLoss(tau=2.0), [3, 1])(z, tail).item() == pytest.approx(math.log(10))


def test_label_aware_smoothing_by_hand():
    # counts 9, 5, 1: half way, concave 0.3 sin 45° = 0.2121, linear 0.15, convex 0.3 (1 - cos 45°) = 0.0879;
    # p = (1/4, 1/2, 1/4): -log p of the target log 2 = 0.6931, mean of all (2 log 4 + log 2)/3 = 1.1552
    z = torch.tensor([[0.0, math.log(2), 0.0]])
    for shape, smoothing in (("concave", 0.21213), ("linear", 0.15), ("convex", 0.08787)):
        loss = counted(LabelAwareSmoothingLoss(shape=shape), [9, 5, 1])
        expected = (1 - smoothing) * 0.693147 + smoothing * 1.155245
        assert loss(z, torch.tensor([1])).item() == pytest.approx(expected, abs=1e-5)
        assert loss(z, torch.tensor([2])).item() == pytest.approx(math.log(4))  # the tail is not smoothed
        assert loss(z, torch.tensor([0])).item() == pytest.approx(0.7 * math.log(4) + 0.3 * 1.155245, abs=1e-5)


@pytest.mark.parametrize(
    ("loss", "counts"),
    [
        (FocalLoss(gamma=0.0), COUNTS),
        (LDAMLoss(max_margin=0.0), COUNTS),
        (LogitAdjustedLoss(tau=0.0), COUNTS),
        (LogitAdjustedLoss(), [7] * K),
        (LabelAwareSmoothingLoss(head_smoothing=0.0), COUNTS),
        (LabelAwareSmoothingLoss(), [7] * K),
    ],
    ids=repr,
)
def test_at_its_limit_a_loss_is_cross_entropy(loss, counts):
    for target in (TARGET, MIXED):
        assert_close(counted(loss, counts)(LOGITS, target), F.cross_entropy(LOGITS, target))


def test_equal_smoothing_of_head_and_tail_is_label_smoothing():
    loss = counted(LabelAwareSmoothingLoss(head_smoothing=0.1, tail_smoothing=0.1))
    assert_close(loss(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET, label_smoothing=0.1))


def test_the_bare_logits_of_the_adjusted_loss_decide_as_if_classes_were_balanced():
    # two classes that look alike, seen 9 to 1: cross-entropy learns log 9, the adjusted loss no preference
    z = torch.zeros(1, 2, requires_grad=True)
    target = torch.tensor([[0.9, 0.1]])
    counted(LogitAdjustedLoss(), [9, 1])(z, target).backward()
    assert_close(z.grad, torch.zeros(1, 2), rtol=0, atol=1e-7)


@pytest.mark.parametrize("make", COUNTING)
def test_a_class_without_training_images_counts_as_the_rarest_that_has_some(make):
    assert_close(
        counted(make(), [60, 30, 20, 10, 0])(LOGITS, TARGET), counted(make(), [60, 30, 20, 10, 10])(LOGITS, TARGET)
    )


SOFTMAX_LOSSES = [CrossEntropyLoss, FocalLoss, *COUNTING]


@pytest.mark.parametrize("make", SOFTMAX_LOSSES)
@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=K, max_size=K), min_size=1, max_size=6),
    st.floats(-100, 100),
    st.lists(st.integers(0, 10**6), min_size=K, max_size=K).filter(any),
)
def test_a_softmax_loss_is_not_negative_and_sees_no_shift_of_all_logits(make, rows, shift, counts):
    z = torch.tensor(rows)
    loss = counted(make(), counts)
    for target in (torch.arange(len(z)) % K, torch.full((len(z), K), 1 / K)):
        value = loss(z, target)
        assert value >= 0
        assert_close(loss(z + shift, target), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", SOFTMAX_LOSSES)
@pytest.mark.parametrize("size", [1e4, 1e30])
@pytest.mark.parametrize("soft", [False, True])
def test_extreme_logits_give_finite_losses_and_gradients(make, size, soft):
    z = torch.tensor([[size, -size, 0, 0, 0], [0, 0, 0, 0, size], [0, 0, 0, 0, 0]], requires_grad=True)
    target = torch.tensor([0, 1, 2])
    loss = counted(make())(z, F.one_hot(target, K).float() if soft else target)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(z.grad).all()


def test_the_focal_gradient_of_a_certain_sample_is_finite_below_gamma_1():
    z = torch.tensor([[200.0, 0.0]], requires_grad=True)
    FocalLoss(gamma=0.5)(z, torch.tensor([0])).backward()
    assert_close(z.grad, torch.zeros(1, 2))


def test_ldam_keeps_its_digits_where_the_margin_cancels_a_probability_of_almost_one():
    # -log p_y is below float32's resolution, the margin brings it back: log(1 + exp(15 - 20)) = 0.006715
    loss = counted(LDAMLoss(), [1, 1])
    z = torch.tensor([[20.0, 0.0]])
    for target in (torch.tensor([0]), torch.tensor([[1.0, 0.0]])):
        assert loss(z, target).item() == pytest.approx(0.0067153, rel=1e-4)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("classes", [1, 2, 100_000])
def test_any_number_of_classes(make, classes):
    loss = counted(make(class_balance="effective"), torch.arange(classes) + 1)
    z = torch.zeros(2, classes, requires_grad=True)
    value = loss(z, torch.tensor([0, classes - 1]))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (CosineHead(8, K), "scale 30.0.*CosineHead has 16.0"),
        (ETFHead(8, K), "scale 30.0.*ETFHead has 1.0"),
        (ETFHead(8, K, scale=30.0, learn_scale=True), "fixed scale"),
        (ETFHead(8, K, scale=30.0, normalize=False), "fixed scale"),
        (LinearHead(8, K), "LinearHead does not give"),
    ],
)
def test_ldam_refuses_a_head_without_cosines_of_its_scale(head, reason):
    with pytest.raises(UserError, match=reason):
        LDAMLoss().check_head(head)


@pytest.mark.parametrize("head", [CosineHead(8, K, cosine_scale=30.0), ETFHead(8, K, scale=30.0)])
def test_ldam_takes_a_cosine_head_of_its_scale(head):
    LDAMLoss().check_head(head)


def test_siblings_share_no_argument_name_with_different_defaults():
    defaults = {}
    for make in LOSSES:
        for name, parameter in inspect.signature(make).parameters.items():
            assert defaults.setdefault(name, parameter.default) == parameter.default


@pytest.mark.parametrize(
    "bad",
    [
        *(partial(FocalLoss, gamma=gamma) for gamma in (-1, math.nan, math.inf)),
        *(partial(LDAMLoss, max_margin=margin) for margin in (-0.1, 2.1, math.nan)),
        *(partial(LDAMLoss, scale=scale) for scale in (0, -1.0, math.nan, math.inf)),
        *(partial(LogitAdjustedLoss, tau=tau) for tau in (-1, math.nan, math.inf)),
        *(partial(LabelAwareSmoothingLoss, head_smoothing=smoothing) for smoothing in (-0.1, 1.0, math.nan)),
        *(partial(LabelAwareSmoothingLoss, tail_smoothing=smoothing) for smoothing in (-0.1, 0.4, math.nan)),
        partial(LabelAwareSmoothingLoss, shape="square"),
        *(partial(make, beta=beta) for make in LOSSES for beta in (-0.1, 1.0, math.nan)),
        *(partial(make, class_balance="bach") for make in LOSSES),
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
    losses = {make.__name__: counted(make(class_balance="batch"))(logits, target).item() for make in LOSSES}
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
        assert mean == pytest.approx(counted(make(class_balance="batch"))(LOGITS, TARGET).item(), rel=1e-6)


def _renormalized_on_rank(rank, logits, target):
    loss = counted(CrossEntropyLoss(class_balance="effective", renormalize=True))
    own = counted(DotRegressionLoss(class_balance="effective", renormalize=True))
    cosines = logits.gather(1, target[:, None]).squeeze(1)
    return [len(target) / B * value.item() for value in (loss(logits, target), own.from_target_logits(cosines, target))]


def test_weights_are_renormalized_over_all_ranks(two_processes):
    """Each process's mean counts by its images, as the classifier has it."""
    parts = two_processes(_renormalized_on_rank, [(LOGITS[:4], TARGET[:4]), (LOGITS[4:], TARGET[4:])])
    weights = effective_weights(COUNTS)
    squares = (LOGITS[torch.arange(B), TARGET] - 1) ** 2 / 2
    dot_regression = (weights[TARGET] * squares).sum() / weights[TARGET].sum()
    for value, expected in zip(
        zip(*parts, strict=True), (F.cross_entropy(LOGITS, TARGET, weight=weights), dot_regression), strict=True
    ):
        assert sum(value) == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("counts", [[5, -1], [[5, 1]], [float("nan"), 1.0], [float("inf"), 1.0]])
def test_what_are_no_counts_is_refused(counts):
    with pytest.raises(UserError, match="numbers of images, none below 0"):
        LDAMLoss().set_class_counts(torch.tensor(counts))
