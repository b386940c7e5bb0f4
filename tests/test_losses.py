import math
import pickle
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from etflight import (
    BinaryCrossEntropyLoss,
    Classifier,
    CosineHead,
    CrossEntropyLoss,
    DotRegressionLoss,
    ETFHead,
    FocalLoss,
    LabelAwareSmoothingLoss,
    LDAMLoss,
    LinearHead,
    LogitAdjustedLoss,
    NONLLoss,
    NTCELoss,
)
from etflight.checkpoint.specs import find_class, to_spec
from etflight.losses import Loss, class_weights_of
from etflight.utils.errors import UserError

K, B = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(B, K, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # class 4 is absent
MIXED = 0.3 * F.one_hot(TARGET, K).double() + 0.7 * F.one_hot(TARGET.roll(1), K).double()
COUNTS = torch.tensor([60, 30, 20, 10, 1])
COUNTING = [LDAMLoss, LogitAdjustedLoss, LabelAwareSmoothingLoss, BinaryCrossEntropyLoss]  # need the training counts
SOFTMAX_LOSSES = [CrossEntropyLoss, FocalLoss, *COUNTING]
LOSSES = [DotRegressionLoss, *SOFTMAX_LOSSES]
OF_THE_BATCH = [NTCELoss, NONLLoss]  # what a sample costs depends on the others
BALANCES = ["none", "batch", "global", "effective"]


def counted(loss, counts=COUNTS):
    loss.set_class_counts(counts)
    return loss


@pytest.mark.parametrize("make", [*LOSSES, *OF_THE_BATCH])
def test_checkpoints_and_other_processes_find_a_loss_in_the_package_whichever_file_holds_it(make):
    spec = to_spec(make, "loss")
    assert spec["class_path"] == f"etflight.losses.{make.__name__}"
    assert find_class(spec, Loss) is make
    assert pickle.loads(pickle.dumps(make)) is make


class OfTheWholeBatch(CrossEntropyLoss):
    def sample_losses(self, logits, target):
        return super().sample_losses(logits, target).mean()


def test_a_loss_of_ones_own_that_takes_the_mean_itself_is_refused():
    with pytest.raises(UserError, match=r"OfTheWholeBatch: sample_losses returned \[\] for 12 images: let it return"):
        OfTheWholeBatch(class_balance="batch")(LOGITS, TARGET)


# --- each loss is its equation -----------------------------------------------------------------------------------------


def log_softmax(z):
    return z - np.log(np.exp(z - z.max(1, keepdims=True)).sum(1, keepdims=True)) - z.max(1, keepdims=True)


def dot_regression(z, n, length=1.0):
    return (z - length) ** 2 / (2 * length)


def cross_entropy(z, n, epsilon=0.0):
    log_p = log_softmax(z)
    return -(1 - epsilon) * log_p - epsilon * log_p.mean(1, keepdims=True)


def focal(z, n, gamma=2.0):
    return -((1 - np.exp(log_softmax(z))) ** gamma) * log_softmax(z)


def ldam(z, n, max_margin=0.5, scale=30.0):
    margins = n**-0.25 * (max_margin / (n**-0.25).max())
    return np.stack([-log_softmax(z - scale * margins * np.eye(len(n))[k])[:, k] for k in range(len(n))], axis=1)


def adjusted(z, n, tau=1.0):
    return -log_softmax(z + tau * np.log(n / n.sum()))


def label_aware(z, n, head=0.3, tail=0.0, shape="concave"):
    quarter = (n - n.min()) * np.pi / (2 * (n.max() - n.min()))
    rise = {"concave": np.sin(quarter), "linear": quarter * 2 / np.pi, "convex": 1 + np.sin(1.5 * np.pi + quarter)}
    return cross_entropy(z, n, tail + (head - tail) * rise[shape])  # as in the authors' code


def binary(z, n, tau=1.0):
    odds = (n / n.sum()) / (1 - n / n.sum())
    yes, no = (np.logaddexp(0, sign * (z + tau * np.log(odds))) for sign in (-1, 1))
    return yes - no + no.sum(1, keepdims=True)


ORACLES = {  # the loss, and what a sample costs by its class
    "dot regression": (DotRegressionLoss(), dot_regression),
    "dot regression, length 4": (DotRegressionLoss(length=4.0), partial(dot_regression, length=4.0)),
    "cross-entropy": (CrossEntropyLoss(), cross_entropy),
    "cross-entropy, smoothed": (CrossEntropyLoss(label_smoothing=0.1), partial(cross_entropy, epsilon=0.1)),
    "focal": (FocalLoss(), focal),
    "focal, gamma 0.5": (FocalLoss(gamma=0.5), partial(focal, gamma=0.5)),
    "margins": (LDAMLoss(), ldam),
    "other margins": (LDAMLoss(max_margin=0.2, scale=4.0), partial(ldam, max_margin=0.2, scale=4.0)),
    "balanced softmax": (LogitAdjustedLoss(), adjusted),
    "adjusted by half": (LogitAdjustedLoss(tau=0.5), partial(adjusted, tau=0.5)),
    "yes or no": (BinaryCrossEntropyLoss(), binary),
    "yes or no, no prior": (BinaryCrossEntropyLoss(tau=0.0), partial(binary, tau=0.0)),
    **{
        f"smoothed, {shape}": (
            LabelAwareSmoothingLoss(head_smoothing=0.4, tail_smoothing=0.1, shape=shape),
            partial(label_aware, head=0.4, tail=0.1, shape=shape),
        )
        for shape in ("concave", "linear", "convex")
    },
}


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_a_loss_is_its_equation_in_numpy(name, spread, default_dtype):
    """In float64 to rounding, in float32 and bfloat16 as exact as float32 can be; of indices and of probabilities."""
    loss, oracle = ORACLES[name]
    counted(loss)
    for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
        z = (spread * LOGITS).to(dtype)
        costs = torch.from_numpy(oracle(z.double().numpy(), COUNTS.double().numpy()))
        default_dtype(dtype)  # as it is within the steps of a network in that precision
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            found, mixed = loss(z, TARGET), loss(z, MIXED.to(z))
        assert found.dtype == mixed.dtype == torch.promote_types(dtype, torch.float32)
        assert_close(found.double(), costs.gather(1, TARGET[:, None]).mean(), rtol=rtol, atol=0.1 * rtol)
        assert_close(mixed.double(), (MIXED.to(z).double() * costs).sum(1).mean(), rtol=rtol, atol=0.1 * rtol)


def of_the_batch(z, target, temperature, own_class):
    """Sample by sample: minus the logit of each class, plus the logarithm of the sum over its rivals in the batch; [B, K]."""
    z, costs = z / temperature, np.zeros(z.shape)
    for k in range(z.shape[1]):
        rivals = [z[j, k] for j in range(len(z)) if own_class or target[j, k] == 0]
        if rivals:
            costs[:, k] = np.logaddexp.reduce(rivals) - z[:, k]
    return costs


@pytest.mark.parametrize("make", OF_THE_BATCH)
@pytest.mark.parametrize(("spread", "temperature"), [(1.0, 0.1), (30.0, 0.5)])
@pytest.mark.parametrize("balance", ["none", "batch"])
def test_a_loss_of_the_batch_is_its_equation_in_numpy(make, spread, temperature, balance):
    loss = make(temperature=temperature, class_balance=balance)
    for target in (F.one_hot(TARGET, K).double(), MIXED):
        for dtype, rtol in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
            z = (spread * LOGITS).to(dtype)
            costs = torch.from_numpy(of_the_batch(z.double().numpy(), target.numpy(), temperature, make is NTCELoss))
            weights = weights_of(balance, target.sum(0))
            expected = (target * weights * costs).sum(1).mean()
            assert_close(loss(z, target.to(dtype)).double(), expected, rtol=rtol, atol=10 * rtol)
            if target is not MIXED:
                assert_close(loss(z, TARGET).double(), expected, rtol=rtol, atol=10 * rtol)


@pytest.mark.parametrize("make", OF_THE_BATCH)
def test_a_loss_of_the_batch_is_a_softmax_over_classes_when_it_does_not_train(make):
    loss = make(temperature=0.5).eval()
    for target in (TARGET, MIXED):
        assert_close(loss(LOGITS, target), F.cross_entropy(2 * LOGITS, target))
        halves = [loss(z, t) for z, t in zip(LOGITS.split(6), target.split(6), strict=True)]
        assert_close(torch.stack(halves).mean(), loss(LOGITS, target))


def test_the_probabilities_of_a_loss_of_the_batch_have_its_temperature():
    model = Classifier(10, "resnet20_cifar", ETFHead, partial(NONLLoss, temperature=0.2), in_chans=1).eval()
    images = torch.randn(4, 1, 8, 8, generator=GENERATOR)
    assert_close(model.probabilities(images), (model(images) / 0.2).softmax(1))


def test_nonl_of_a_batch_of_one_class_is_0_and_so_is_its_gradient():
    z = LOGITS.clone().requires_grad_()
    for target in (torch.ones_like(TARGET), F.one_hot(torch.ones_like(TARGET), K).double()):
        loss = NONLLoss()(z, target)
        loss.backward()
        assert loss.item() == 0
        assert not z.grad.any()


# --- class balance -----------------------------------------------------------------------------------------------------


def weights_of(balance, n, exponent=1.0, beta=0.9999):
    """By class, in NumPy, of counts in the batch or in training."""
    n = np.asarray(n, dtype=np.float64)
    seen = n > 0
    with np.errstate(divide="ignore", invalid="ignore"):
        if balance == "none":
            weights = np.ones(len(n))
        elif balance == "effective":  # as the code of LDAM-DRW writes them
            weights = np.where(seen, (1 - beta) / (1 - np.power(beta, n)), 0)
            weights = weights / weights.sum() * len(n)
        else:
            weights = n.sum() / (seen.sum() if balance == "batch" else len(n)) / n
        return torch.from_numpy(np.where(seen, weights**exponent, 0))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize(("exponent", "renormalize"), [(1.0, False), (0.5, True)])
def test_a_balanced_loss_weighs_what_each_class_costs(make, balance, exponent, renormalize):
    loss = counted(make(class_balance=balance, exponent=exponent, renormalize=renormalize))
    costs = torch.stack([loss.sample_losses(LOGITS, torch.full((B,), k)) for k in range(K)], dim=1)
    for target in (F.one_hot(TARGET, K).double(), MIXED):
        counts = target.sum(0) if balance == "batch" else COUNTS
        shares = target * weights_of(balance, counts, exponent if balance != "none" else 1)
        expected = (shares * costs).sum() / (shares.sum() if renormalize else B)
        assert_close(loss(LOGITS, target), expected)
    assert_close(loss(LOGITS, F.one_hot(TARGET, K).double()), loss(LOGITS, TARGET))


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("balance", BALANCES)
def test_in_eval_mode_the_loss_is_unweighted_and_needs_no_counts(make, balance):
    plain = make() if make in (DotRegressionLoss, FocalLoss) else CrossEntropyLoss()
    logits = LOGITS
    if make is BinaryCrossEntropyLoss:  # the log-odds of one class among K
        plain, logits = make(tau=0), LOGITS - math.log(K - 1)
    for target in (TARGET, MIXED):
        assert_close(make(class_balance=balance).eval()(LOGITS, target), plain(logits, target))


WEIGHTS = torch.tensor([1.0, 0.5, 2.0, 4.0, 8.0], dtype=torch.float64)


@pytest.mark.parametrize("make", [*LOSSES, *OF_THE_BATCH])
@pytest.mark.parametrize("balance", BALANCES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_explicit_weights_multiply_those_of_the_balance_in_training_only(make, balance, renormalize):
    loss, plain = (counted(make(class_balance=balance, renormalize=renormalize)) for _ in range(2))
    loss.set_class_weights(WEIGHTS)
    for target in (F.one_hot(TARGET, K).double(), MIXED):
        counts = target.sum(0) if balance == "batch" else COUNTS
        shares = target * weights_of(balance, counts) * WEIGHTS
        expected = loss.sample_losses(LOGITS, shares).sum() / (shares.sum() if renormalize else B)
        assert_close(loss(LOGITS, target), expected)
        assert_close(loss.eval()(LOGITS, target), plain.eval()(LOGITS, target), rtol=0, atol=0)
        loss.train()
    assert_close(loss(LOGITS, F.one_hot(TARGET, K).double()), loss(LOGITS, TARGET))
    if make is DotRegressionLoss:
        own = LOGITS.gather(1, TARGET[:, None]).squeeze(1)
        assert_close(loss.from_target_logits(own, TARGET), loss(LOGITS, TARGET))
        assert_close(plain.train().from_target_logits(own, TARGET), plain(LOGITS, TARGET))
    loss.set_class_weights(None)
    assert_close(loss(LOGITS, TARGET), plain.train()(LOGITS, TARGET), rtol=0, atol=0)


def test_explicit_weights_alone_are_those_of_torchs_cross_entropy():
    loss = CrossEntropyLoss(renormalize=True)
    loss.set_class_weights(WEIGHTS)
    assert_close(loss(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET, weight=WEIGHTS))


def test_weights_by_name_or_in_a_list():
    names = ["cat", "dog", "cow"]
    assert class_weights_of([1, 2.5, 3], 3, None).tolist() == [1, 2.5, 3]
    assert class_weights_of({"cow": 2, "cat": 0.5}, 3, names).tolist() == [0.5, 1, 2]


@pytest.mark.parametrize(
    ("given", "names", "reason"),
    [
        ({"cot": 2}, ["cat", "dog", "cow"], "no class is called 'cot'; near matches: cow, cat"),
        ({"cat": 2}, ["cat", "dog", "cat"], "2 classes are called 'cat': give a list of 3 weights"),
        ({"horse": 2}, ["cat", "dog", "cow"], "no class is called 'horse'; the first are cat, dog, cow"),
        ({"cat": 2}, None, "no class names: give a list of 3 weights"),
        ([1, 2], None, "2 entries for 3 classes"),
        *(
            ([1, 2, bad], None, "give positive, finite numbers")
            for bad in (0, -1.0, math.nan, math.inf, "2", None, True)
        ),
        ({"cat": 0.0}, ["cat", "dog", "cow"], r"0.0 is no weight"),
        ([np.float64(1)] * 3, None, "is no weight"),  # a checkpoint could not be read again
    ],
)
def test_what_are_no_class_weights_is_refused(given, names, reason):
    with pytest.raises(UserError, match=f"class_weights.*{reason}"):
        class_weights_of(given, 3, names)


def test_batch_balanced_dot_regression_is_the_released_codes_loss():
    # scaling class vector k by sqrt((B/U)/n_k) gives 1/2 mean (B/U)/n_y (cos - 1)^2
    cosine = LOGITS.tanh()
    scale = ((B / 4) / torch.tensor([6.0, 3, 2, 1]).double()).sqrt()[TARGET]
    z = cosine[torch.arange(B), TARGET]
    released = 0.5 * ((z * scale - scale) ** 2).mean()
    assert_close(DotRegressionLoss(class_balance="batch")(cosine, TARGET), released)


@pytest.mark.parametrize("beta", [0.0, 0.9, 0.9999, 1 - 2**-40])
@pytest.mark.parametrize("counts", [[60, 30, 20, 10, 1], [10**7, 10**6, 500, 2, 1]])
def test_effective_balance_is_exact_for_any_beta(beta, counts):
    loss = counted(CrossEntropyLoss(class_balance="effective", beta=beta), counts)
    # in double, of geometric sums: 1 + β + … + β^(n-1) is the effective number
    n = np.array(counts, dtype=np.float64)
    effective = -np.expm1(n * np.log1p(beta - 1)) / (1 - beta) if beta else np.ones(K)
    expected = torch.from_numpy(1 / effective * K / (1 / effective).sum())
    weights = [loss(torch.zeros(1, K), torch.tensor([k])).item() / math.log(K) for k in range(K)]
    assert_close(torch.tensor(weights).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "loss", [CrossEntropyLoss(class_balance="effective"), *(make() for make in COUNTING)], ids=repr
)
def test_a_class_without_training_images_counts_as_nothing_or_as_the_rarest_that_has_some(loss):
    none, rarest = (counted(loss, [60, 30, 20, 10, n])(LOGITS, TARGET) for n in (0, 10))
    assert torch.isfinite(none)
    if type(loss) in COUNTING:
        assert_close(none, rarest)


def test_equal_counts_smooth_no_class():
    assert_close(counted(LabelAwareSmoothingLoss(), [7] * K)(LOGITS, TARGET), F.cross_entropy(LOGITS, TARGET))


@pytest.mark.parametrize(
    "loss",
    [CrossEntropyLoss(class_balance="global"), *(make() for make in COUNTING)],
    ids=lambda loss: type(loss).__name__,
)
def test_a_loss_that_needs_counts_says_what_to_do_without_them(loss):
    with pytest.raises(UserError, match=f"{type(loss).__name__}.*set_class_counts"):
        loss(LOGITS, TARGET)


@pytest.mark.parametrize("target", [torch.rand(8, 5), torch.rand(8), torch.zeros(7, dtype=torch.long)])
def test_a_target_of_another_shape_is_refused(target):
    with pytest.raises(UserError, match=r"CrossEntropyLoss: the target is .*: give class indices"):
        CrossEntropyLoss()(torch.randn(8, 4), target)


@pytest.mark.parametrize(
    ("set_numbers", "numbers", "reason"),
    [
        (Loss.set_class_counts, [[0, 0]], "no class has a training image"),
        (Loss.set_class_counts, [[5, -1], [[5, 1]], [math.inf, 1.0]], "class_counts must be"),
        (Loss.set_class_weights, [[1.0, 0.0], [1.0, math.nan], [1.0, math.inf], [[1.0]]], "class_weights must be"),
    ],
)
def test_what_are_no_counts_or_weights_is_refused(set_numbers, numbers, reason):
    for wrong in numbers:
        with pytest.raises(UserError, match=reason):
            set_numbers(LDAMLoss(), torch.tensor(wrong))


@pytest.mark.parametrize(
    "make", [*COUNTING, *(partial(CrossEntropyLoss, class_balance=balance) for balance in ("global", "effective"))]
)
def test_the_first_step_takes_the_counts_to_its_device_and_no_other_step_waits_for_them(make):
    loss = counted(make(), COUNTS.clone())
    loss(LOGITS.to("meta"), TARGET.to("meta"))
    assert loss.training_counts().device == torch.device("meta")


# --- numbers that are hard ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*LOSSES, *OF_THE_BATCH])
@pytest.mark.parametrize("target", [TARGET, MIXED], ids=["indices", "probabilities"])
def test_gradients_are_those_of_finite_differences(make, target):
    loss = counted(make(class_balance="batch"))
    assert torch.autograd.gradcheck(lambda z: loss(z, target), (LOGITS.clone().requires_grad_(),))


@pytest.mark.parametrize("make", [*SOFTMAX_LOSSES, *OF_THE_BATCH])
@pytest.mark.parametrize("soft", [False, True])
def test_extreme_logits_give_finite_losses_and_gradients(make, soft):
    for size in (1e4, 1e30):
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


@pytest.mark.parametrize("make", [*LOSSES, *OF_THE_BATCH])
@pytest.mark.parametrize("classes", [1, 100_000])
def test_any_number_of_classes(make, classes):
    loss = counted(make(class_balance="effective"), torch.arange(classes) + 1)
    z = torch.zeros(2, classes, requires_grad=True)
    loss(z, torch.tensor([0, classes - 1])).backward()
    assert torch.isfinite(z.grad).all()


# --- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "head", "reason"),
    [
        (DotRegressionLoss(), ETFHead(8, K, learn_scale=True), "learn_scale"),
        (DotRegressionLoss(), ETFHead(8, K, normalize=False), "normalize=True"),
        (DotRegressionLoss(), ETFHead(8, K, scale=2.0), "length 1.0.*scale 2.0"),
        (DotRegressionLoss(), LinearHead(8, K), "LinearHead"),
        (DotRegressionLoss(), CosineHead(8, K), "CosineHead"),
        (LDAMLoss(), CosineHead(8, K), "scale 30.0.*CosineHead has 16.0"),
        (LDAMLoss(), ETFHead(8, K), "scale 30.0.*ETFHead has 1.0"),
        (LDAMLoss(), ETFHead(8, K, scale=30.0, learn_scale=True), "fixed scale"),
        (LDAMLoss(), ETFHead(8, K, scale=30.0, normalize=False), "fixed scale"),
        (LDAMLoss(), LinearHead(8, K), "LinearHead does not give"),
    ],
)
def test_a_loss_refuses_a_head_it_cannot_train(loss, head, reason):
    with pytest.raises(UserError, match=reason):
        loss.check_head(head)


def test_a_loss_takes_a_head_of_its_own_scale():
    DotRegressionLoss(length=2.0).check_head(ETFHead(8, K, scale=2.0, learn_rotation=True))
    LDAMLoss().check_head(CosineHead(8, K, scale=30.0))
    LDAMLoss().check_head(ETFHead(8, K, scale=30.0))


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (FocalLoss, "gamma", [-1, math.nan, math.inf]),
        (LDAMLoss, "max_margin", [-0.1, 2.1, math.nan]),
        (LDAMLoss, "scale", [0, -1.0, math.nan, math.inf]),
        (LogitAdjustedLoss, "tau", [-1, math.nan, math.inf]),
        (LabelAwareSmoothingLoss, "head_smoothing", [-0.1, 1.0, math.nan]),
        (LabelAwareSmoothingLoss, "tail_smoothing", [-0.1, 0.4, math.nan]),
        (LabelAwareSmoothingLoss, "shape", ["square"]),
        (DotRegressionLoss, "length", [0, -1.0, math.nan, math.inf]),
        (CrossEntropyLoss, "label_smoothing", [1.0, -0.1, math.nan]),
        (BinaryCrossEntropyLoss, "tau", [-1, math.nan, math.inf]),
        *((make, "temperature", [0, -1.0, math.nan, math.inf]) for make in OF_THE_BATCH),
        *((make, "class_balance", ["bach"]) for make in [*LOSSES, *OF_THE_BATCH]),
        (FocalLoss, "beta", [-0.1, 1.0, math.nan]),
        (FocalLoss, "exponent", [-1, math.nan, math.inf]),
    ],
)
def test_bad_arguments_are_refused(make, name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{make.__name__}: {name} must"):
            make(**{name: value})


# --- many processes ----------------------------------------------------------------------------------------------------

DISTRIBUTED = [
    *(partial(make, class_balance="batch") for make in [*LOSSES, *OF_THE_BATCH]),
    partial(CrossEntropyLoss, class_balance="effective", renormalize=True),
    partial(DotRegressionLoss, class_balance="effective", renormalize=True),
]


def loss_and_gradient(make, logits, target, images, processes):
    """What a process adds to the gradient of the step, as the classifier and DDP have it."""
    loss, z = counted(make()), logits.clone().requires_grad_()
    loss.set_class_weights(WEIGHTS)
    value = loss(z, target)
    (value * (len(z) * processes / images)).backward()
    return value.item(), z.grad / processes


def _gradients_on_rank(rank, logits, targets):
    target = targets[0]
    own = logits.gather(1, target[:, None]).squeeze(1)
    for make in DISTRIBUTED:
        if isinstance(loss := counted(make()), DotRegressionLoss):
            assert_close(loss.from_target_logits(own, target, num_classes=K), loss(logits, target))
    with pytest.raises(UserError, match="num_classes"):  # both processes, before either waits for the other
        DotRegressionLoss(class_balance="batch").from_target_logits(own, target)
    if rank == 0:  # no collective call in eval: one rank alone must not wait for the other
        DotRegressionLoss(class_balance="batch").eval()(logits, target)
    return [loss_and_gradient(make, logits, target, B, 2) for make in DISTRIBUTED for target in targets]


def test_two_uneven_processes_have_the_loss_and_the_gradient_of_the_whole_batch(two_processes):
    parts = slice(0, 4), slice(4, B)  # the first has images of one class
    first, second = two_processes(_gradients_on_rank, [(LOGITS[part], (TARGET[part], MIXED[part])) for part in parts])
    wholes = [loss_and_gradient(make, LOGITS, target, B, 1) for make in DISTRIBUTED for target in (TARGET, MIXED)]
    for (loss, gradient), (other, others), (whole, expected) in zip(first, second, wholes, strict=True):
        assert (4 * loss + 8 * other) / B == pytest.approx(whole, rel=1e-9)
        assert_close(torch.cat([gradient, others]), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), LogitAdjustedLoss(), NONLLoss()], ids=repr)
def test_no_target_is_left_out_of_the_mean_silently(loss):
    counted(loss, [3, 2, 1])
    for mode in (True, False):
        with pytest.raises((IndexError, RuntimeError)):
            loss.train(mode)(torch.zeros(2, 3), torch.tensor([0, -100]))
