"""Learning rates by depth and by part: those of timm's own rule, at every epoch of a schedule, and in the steps that are taken."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from timm.optim import param_groups_layer_decay
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.optim import WarmupCosine, WarmupMultiStep, rate_groups
from etflight.utils.errors import UserError
from tests.training import new_trainer


def model(backbone="resnet20_cifar", decay=0.5, **options):
    torch.manual_seed(0)
    return Classifier(10, backbone, LinearHead, CrossEntropyLoss, layer_decay=decay, **options)


IMAGES, TARGET = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)


def by_name(classifier, groups, key):
    names = {id(parameter): name for name, parameter in classifier.named_parameters()}
    return {names[id(p)]: float(group[key]) for group in groups for p in group["params"]}


def scales_of(classifier, decay, factors=None):
    return by_name(classifier, rate_groups(classifier, classifier.backbone, decay, factors), "lr_scale")


class Rates(Callback):
    """The rate of each parameter, by name, in each epoch."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.seen.append(by_name(pl_module, trainer.optimizers[0].param_groups, "lr"))


def fit(classifier, epochs=1, ckpt_path=None):
    rates = Rates()
    trainer = new_trainer(rates, max_epochs=epochs)
    trainer.fit(classifier, DataLoader(TensorDataset(IMAGES, TARGET), batch_size=6), ckpt_path=ckpt_path)
    return rates.seen, trainer


def test_a_step_goes_as_far_as_its_layers_rate_which_falls_by_one_factor_from_the_head_to_the_stem():
    classifier, twin = (model(optimizer=partial(SGD, lr=0.1, weight_decay=0.01)) for _ in range(2))
    (seen,), _ = fit(classifier)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1, 2)]
    depth = {"conv1": 10, "bn1": 10} | {block: 9 - i for i, block in enumerate(blocks)} | {"head": 0}
    F.cross_entropy(twin.train()(IMAGES), TARGET).backward()
    for name, parameter in twin.named_parameters():
        part = name.removeprefix("backbone.")
        rate = 0.1 * 0.5 ** depth[".".join(part.split(".")[:2]) if part.startswith("layer") else part.split(".")[0]]
        assert seen[name] == pytest.approx(rate, rel=1e-12), name
        expected = parameter.detach() - rate * (parameter.grad + 0.01 * parameter.detach())
        torch.testing.assert_close(classifier.get_parameter(name).detach(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_efficientnet", "densenet_bc_150_cifar"])
def test_rates_are_those_that_timm_gives_the_network_with_a_classifier(name):
    whole = timm.create_model(name, num_classes=10)
    classifier = {n for n, layer in whole.named_modules() if layer is whole.get_classifier()}.pop()
    timms = by_name(whole, param_groups_layer_decay(whole, layer_decay=0.7), "lr_scale")
    scales = scales_of(model(name), 0.7)
    assert scales.pop("head.weight") == scales.pop("head.bias") == timms.pop(f"{classifier}.weight") == 1
    timms.pop(f"{classifier}.bias")
    assert {name.removeprefix("backbone."): scale for name, scale in scales.items()} == pytest.approx(timms)


def test_a_part_has_its_own_factor_beside_that_of_its_depth_and_a_part_within_it_another():
    scales = {"backbone": 0.1, "backbone.conv1": 0.5, "head": 2.0}
    plain, scaled = (scales_of(model(), 0.5, factors) for factors in (None, scales))
    for name, rate in scaled.items():
        factor = 2.0 if name.startswith("head.") else 0.5 if name == "backbone.conv1.weight" else 0.1
        assert rate == pytest.approx(factor * plain[name], rel=1e-12), name


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ({"hed": 2.0}, "'hed'.*such as head"),
        ({"loss": 2.0}, "no part of the model with weights"),
        ({"head": 0.0}, "head is 0"),
    ],
)
def test_an_unknown_part_or_an_invalid_factor_is_refused(scales, reason):
    with pytest.raises(UserError, match=f"lr_scale.*{reason}"):
        fit(model(lr_scale=scales))


@pytest.mark.parametrize(
    "schedule",
    [
        partial(WarmupCosine, warmup_epochs=2),
        partial(WarmupMultiStep, milestones=[3], warmup_epochs=2),
        partial(MultiStepLR, milestones=[2]),
    ],
)
def test_a_schedule_keeps_the_ratios_in_every_epoch(schedule):
    options = {"optimizer": partial(AdamW, lr=0.1), "lr_scheduler": schedule}
    decayed, trainer = fit(model(**options), epochs=4)
    plain, other = fit(model(decay=1.0, **options), epochs=4)
    start = decayed[0]
    for rates, expected in zip(decayed, plain, strict=True):
        assert rates["head.weight"] == pytest.approx(expected["head.weight"])
        for name, rate in rates.items():
            assert rate / rates["head.weight"] == pytest.approx(start[name] / start["head.weight"])
    assert trainer.callback_metrics["train/lr"] == pytest.approx(float(other.callback_metrics["train/lr"]))


@pytest.mark.parametrize(
    "schedule", [partial(OneCycleLR, max_lr=0.1, total_steps=9), partial(CyclicLR, base_lr=0.01, max_lr=0.1)]
)
def test_a_schedule_that_knows_one_rate_only_is_refused(schedule):
    with pytest.raises(UserError, match=f"{schedule.func.__name__} gives all layers one learning rate"):
        fit(model(optimizer=partial(SGD, lr=0.1, momentum=0.9), lr_scheduler=schedule))
    fit(model(decay=1.0, optimizer=partial(SGD, lr=0.1, momentum=0.9), lr_scheduler=schedule))


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_a_layer_decay_out_of_range_is_refused(decay):
    with pytest.raises(UserError, match="layer_decay is"):
        model(decay=decay)


def test_a_resumed_run_with_another_factor_is_refused(tmp_path):
    _, trainer = fit(model())
    trainer.save_checkpoint(tmp_path / "c.ckpt")
    for option, other in (("layer_decay", model(decay=0.6)), ("lr_scale", model(lr_scale={"head": 0.5}))):
        with pytest.raises(UserError, match=f"{option} differs"):
            fit(other, epochs=2, ckpt_path=tmp_path / "c.ckpt")
