"""Penalties by themselves, and as what a classifier adds to its loss."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import seed_everything
from torch.nn import functional as F
from torch.testing import assert_close

from etflight import (
    Classifier,
    CrossEntropyLoss,
    ETFHead,
    LinearHead,
    NONLLoss,
    ScaledLinearHead,
)
from etflight.data import Digits
from etflight.penalties import center_pull, feature_penalty
from etflight.utils.errors import UserError
from tests.training import new_trainer as trainer

K, B = 5, 12
GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(B, 7, generator=GENERATOR, dtype=torch.float64)
TARGET = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3])  # class 4 is absent
IMAGES, LABELS = torch.randn(16, 1, 8, 8, generator=GENERATOR), torch.arange(16) % 7


# --- each is its equation ----------------------------------------------------------------------------------------------


def spread(e, y):
    """With means that a gradient passes through."""
    classes = [e[y == c] for c in sorted(set(y.tolist()))]
    return sum(((own - own.mean(0)) ** 2).sum() / len(own) for own in classes) / len(classes) / 2


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)])
def test_a_penalty_is_its_equation_in_numpy(dtype, rtol):
    features = FEATURES.to(dtype)
    h = features.double().numpy()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = feature_penalty(features), center_pull(features, TARGET, K)
    expected = (np.linalg.norm(h, axis=1) ** 2).mean() / 2, spread(h, TARGET.numpy())
    for value, oracle in zip(found, expected, strict=True):
        assert value.dtype == torch.promote_types(dtype, torch.float32)
        assert value.item() == pytest.approx(oracle, rel=rtol)


def test_the_pulls_gradient_is_that_of_the_spread_though_its_means_are_detached():
    found, expected = (FEATURES.clone().requires_grad_() for _ in range(2))
    center_pull(found, TARGET, K).backward()
    spread(expected, TARGET).backward()
    assert_close(found.grad, expected.grad)


def test_collapsed_classes_are_not_pulled():
    means = torch.randn(K, 7, generator=GENERATOR, dtype=torch.float64)
    assert center_pull(means[TARGET], TARGET, K).item() < 1e-30
    assert center_pull(means, torch.arange(K), K).item() == 0


def penalties_of_a_process(features, target):
    found = []
    for penalty in (feature_penalty, lambda e: center_pull(e, target, K)):
        e = features.clone().requires_grad_()
        value = penalty(e)
        (value * len(e) / B).backward()  # times the share of images, over the number of processes
        found.append((value.item() * len(e) / B, e.grad))
    return found


def _penalties_on_rank(rank, features, target):
    return penalties_of_a_process(features, target)


def test_two_uneven_processes_have_value_and_gradient_of_the_whole_batch(two_ready_processes):
    parts = two_ready_processes(_penalties_on_rank, [(FEATURES[:5], TARGET[:5]), (FEATURES[5:], TARGET[5:])])
    for first, second, (whole, expected) in zip(*parts, penalties_of_a_process(FEATURES, TARGET), strict=True):
        assert first[0] + second[0] == pytest.approx(whole, rel=1e-12)
        assert_close(torch.cat([first[1], second[1]]), expected, rtol=1e-12, atol=1e-14)


# --- in a training -----------------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    return Classifier(10, "resnet20_cifar", in_chans=1, **options)


class OtherHead(LinearHead):
    def logits(self, embedding):
        return F.linear(embedding, self.weight) ** 2


ETF_CE = {"head": ETFHead, "loss": CrossEntropyLoss}
# with a BatchNorm within and one behind
PROJECTING = {"head": partial(ETFHead, projection_dim=96), "loss": CrossEntropyLoss}
LINEAR = {"head": partial(LinearHead, batch_norm=True), "loss": CrossEntropyLoss}


@pytest.mark.parametrize(
    "parts",
    [{}, ETF_CE, PROJECTING, LINEAR, *({"head": head, "loss": CrossEntropyLoss} for head in (ScaledLinearHead, OtherHead))],
    ids=["dot regression", "frame", "projection", "linear", "scaled", "other"],
)  # fmt: skip
def test_a_step_adds_them_to_its_loss_and_passes_backbone_embedder_and_batch_norm_once(parts):
    model, plain = small(feature_penalty=0.5, center_pull=0.25, **parts), small(**parts)
    passes = []
    for part in (model.backbone, model.head.embedder):
        part.register_forward_hook(lambda part, inputs, output: passes.append(output.shape[0]))
    loss, expected = (each.training_step((IMAGES, LABELS), 0) for each in (model, plain))
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert_close(mine, theirs, rtol=0, atol=0, msg=name)
    features = small(**parts).features(IMAGES)
    embedding = small(**parts).head.embed(features)
    assert_close(loss, expected + 0.5 * feature_penalty(features) + 0.25 * spread(embedding, LABELS))
    assert passes == [16, 16]


def test_train_loss_has_them_and_val_loss_has_not():
    losses = {}
    for factor in (0.0, 100.0):
        frozen = small(feature_penalty=factor, center_pull=factor, optimizer=partial(torch.optim.SGD, lr=0.0), **ETF_CE)
        run = trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=2)
        run.fit(frozen, Digits(batch_size=16))
        losses[factor] = {name: run.callback_metrics[f"{name}/loss"].item() for name in ("train", "val")}
    assert losses[100.0]["train"] > losses[0.0]["train"] + 1
    assert losses[100.0]["val"] == losses[0.0]["val"]


def weights_of_a_process(rank, folder, processes):
    seed_everything(0, verbose=False)
    vit = {"img_size": 8, "patch_size": 4}  # has no BatchNorm, whose statistics would be those of a process
    model = Classifier(
        10, "test_vit", in_chans=1, model_kwargs=vit, head=partial(ETFHead, batch_norm=False),
        loss=partial(NONLLoss, class_balance="batch"), feature_penalty=0.01, center_pull=0.5, class_weights={"3": 4, "7": 0.5},
    )  # fmt: skip
    run = trainer(
        max_epochs=1, limit_train_batches=4, limit_val_batches=0, default_root_dir=folder, devices=processes, precision="64-true",
        strategy="auto" if processes == 1 else "ddp",
    )  # fmt: skip
    run.fit(model, Digits(imbalance_ratio=20, batch_size=60 // processes))
    return model.state_dict()


def test_two_processes_learn_what_one_does(two_ready_processes, tmp_path):
    """With a loss of the whole batch, class weights and both penalties."""
    one = weights_of_a_process(0, tmp_path, 1)
    for two in two_ready_processes(weights_of_a_process, [(tmp_path, 2)] * 2):
        assert_close(two, one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_a_pull_to_class_means_says_that_it_needs_classes(mix):
    options = {"limit_train_batches": 1, "limit_val_batches": 0, "max_epochs": 1}
    with pytest.raises(UserError, match=r"center_pull.*mixup=0"):
        trainer(**options).fit(small(center_pull=0.1, **ETF_CE), Digits(batch_size=16, **{mix: 1.0}))
    trainer(**options).fit(small(feature_penalty=0.1, **ETF_CE), Digits(batch_size=16, **{mix: 1.0}))


@pytest.mark.parametrize("option", ["feature_penalty", "center_pull"])
@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_negative_or_infinite_penalties_are_refused(option, factor):
    with pytest.raises(UserError, match=f"{option} is {factor}: give a finite factor"):
        small(**{option: factor})
