"""Sharpness-aware steps: the ascent, and what a training with them does."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import LBFGS, SGD
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.data import Digits
from etflight.sam import at_sharpest_point
from etflight.utils.errors import UserError
from tests.training import GLOBAL_BATCH, small_vit
from tests.training import new_trainer as trainer

GENERATOR = torch.Generator().manual_seed(0)
IMAGES, TARGET = torch.randn(16, 1, 8, 8, generator=GENERATOR, dtype=torch.float64), torch.arange(16) % 10


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1024.0])
def test_at_the_sharpest_point_parameters_have_moved_by_rho_and_afterwards_are_as_before(adaptive, factor):
    parameters = [nn.Parameter(torch.randn(*shape, dtype=torch.float64)) for shape in ((3, 4), (5,), (2,))]
    own = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters[:2]:
        parameter.grad = factor * torch.randn_like(parameter)
    w, g = (torch.cat([getattr(p, name).flatten() for p in parameters[:2]]) for name in ("data", "grad"))
    ascent = 0.3 * (w**2 * g / (w * g).norm() if adaptive else g / g.norm())
    with at_sharpest_point(parameters, 0.3, adaptive):
        moved = torch.cat([(p.detach() - before).flatten() for p, before in zip(parameters[:2], own[:2], strict=True)])
        torch.testing.assert_close(moved, ascent)
        assert torch.equal(parameters[2], own[2])  # it has no gradient
    assert all(torch.equal(parameter, before) for parameter, before in zip(parameters, own, strict=True))


class OwnStep(Classifier):
    """A subclass with a step of its own."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def classifier(kind=Classifier, **options):
    torch.manual_seed(0)
    return kind(
        10, "resnet20_cifar", LinearHead, CrossEntropyLoss, partial(SGD, lr=0.05, momentum=0.9), in_chans=1, **options
    )


def by_hand(model, batches, rho, steps):
    """SAM with momentum from its paper's algorithm; each step takes `batches`, whose losses are averaged."""
    parameters, momenta = list(model.parameters()), [torch.zeros_like(p) for p in model.parameters()]

    def gradients():
        loss = sum(F.cross_entropy(model(images), target) for images, target in batches) / len(batches)
        return torch.autograd.grad(loss, parameters)

    for _ in range(steps):
        first = gradients()
        statistics = deepcopy(dict(model.named_buffers()))
        norm = torch.cat([g.flatten() for g in first]).norm()
        with torch.no_grad():
            own = [p.clone() for p in parameters]
            for p, g in zip(parameters, first, strict=True):
                p += rho * g / norm
        second = gradients()
        with torch.no_grad():
            for p, before, g, momentum in zip(parameters, own, second, momenta, strict=True):
                p.copy_(before - 0.05 * momentum.mul_(0.9).add_(g))
            for name, buffer in model.named_buffers():
                buffer.copy_(statistics[name])


@pytest.mark.parametrize(("accumulate", "kind"), [(1, Classifier), (2, Classifier), (2, OwnStep)])
def test_steps_are_those_of_the_paper_with_the_statistics_of_the_first_pass(accumulate, kind):
    model, twin = classifier(kind, sam_rho=0.5).double(), classifier().double().train()
    size = 16 // accumulate
    by_hand(twin, list(zip(IMAGES.split(size), TARGET.split(size), strict=True)), rho=0.5, steps=2)
    loader = DataLoader(TensorDataset(IMAGES, TARGET), batch_size=size)
    options = {"max_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": accumulate}
    trainer(**options).fit(model, loader)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, msg=name)
    plain = classifier().double()
    trainer(**options).fit(plain, loader)
    assert not torch.allclose(plain.head.weight, model.head.weight, atol=1e-3)


def test_the_loss_that_is_logged_is_that_of_the_first_pass():
    seen = {}
    for rho in (0.0, 0.5):
        run = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0)
        run.fit(classifier(sam_rho=rho), Digits(batch_size=32))
        seen[rho] = run.callback_metrics["train/loss"].item()
    assert seen[0.5] == seen[0.0]


def train_with_sam(rank, processes=2):
    torch.manual_seed(0)
    model, strategy = small_vit(partial(Classifier, sam_rho=0.1)), "auto" if processes == 1 else "ddp"
    data = Digits(imbalance_ratio=20, batch_size=GLOBAL_BATCH // processes)
    run = trainer(
        devices=processes, strategy=strategy, max_epochs=1, limit_val_batches=0, accumulate_grad_batches=2,
    )  # fmt: skip
    run.fit(model, data)
    return model.state_dict()


def test_two_processes_take_the_steps_of_one(two_ready_processes):
    expected = train_with_sam(0, processes=1)
    for found in two_ready_processes(train_with_sam, [()] * 2):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=5e-6, msg=name)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"sam_rho": -1.0}, "sam_rho is -1.0"),
        ({"sam_adaptive": True}, "sam_adaptive.*sam_rho"),
        ({"sam_rho": 0.1, "optimizer": partial(LBFGS, lr=0.1)}, "sam_rho.*LBFGS"),
    ],
)
def test_what_cannot_be_sharpness_aware_is_refused_in_one_line(options, reason):
    with pytest.raises(UserError, match=reason):
        trainer(max_steps=1, limit_val_batches=0).fit(
            Classifier(10, "resnet20_cifar", **({"head": LinearHead, "loss": CrossEntropyLoss} | options), in_chans=1),
            Digits(batch_size=16),
        )
