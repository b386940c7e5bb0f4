"""The second of two stages: by hand, resumed, on two processes, refused."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from torch.testing import assert_close

from etflight import (
    Classifier,
    CosineHead,
    CrossEntropyLoss,
    ETFHead,
    LabelAwareSmoothingLoss,
    LinearHead,
    ScaledLinearHead,
)
from etflight.callbacks import FineTuning
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.left_by_runs import assert_same_run, read
from tests.system.test_ddp import (
    CPU,
    GLOBAL_BATCH,
    assert_same_rows,
    assert_same_weights,
    finish,
    rows,
    shared_by,
    start,
    weights,
)
from tests.system.test_resume import DIGITS, KILL

CRT = {"load": {"backbone": "backbone"}, "freeze": ["backbone"]}
LWS = {"load": {"backbone": "backbone", "head": "head.linear"}, "freeze": ["backbone", "head.linear"]}
MISLAS = {**LWS, "freeze": ["backbone"]}
VIT = {"backbone": "test_vit", "model_kwargs": {"img_size": 8, "patch_size": 4}}
RESNET = {"backbone": "resnet20_cifar"}


def new_model(kind=RESNET, head=LinearHead, **options):
    seed_everything(0, verbose=False)
    return Classifier(10, in_chans=1, head=head, **{"loss": CrossEntropyLoss, **kind, **options})


def new_trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **{"max_epochs": 3, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options},
    )  # fmt: skip


def full_batch():
    return Digits(imbalance_ratio=20, batch_size=500, crop_padding=0, val_fraction=0.1)


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A checkpoint whose BatchNorm statistics and weights are not those of a new model."""
    path = tmp_path_factory.mktemp("stage_one") / "last.ckpt"
    trainer = new_trainer(max_epochs=1)
    trainer.fit(new_model(), Digits(imbalance_ratio=20, batch_size=100))
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def features(stage_one):
    """What the stage-one model makes of all training images, and their labels."""
    data = full_batch()
    images, labels = data.eval_transform(next(iter(data.eval_dataloader("train"))))
    model = Classifier.load_from_checkpoint(stage_one).eval()
    with torch.no_grad():
        return model.features(images), labels, model


def descend(logits, parameters, labels, steps=3, cost=torch.nn.functional.cross_entropy):
    """Full-batch SGD as the trainer's own: learning rate 0.1, momentum 0.9, weight decay 2e-4."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4)
    for _ in range(steps):
        optimizer.zero_grad()
        cost(logits(), labels).backward()
        optimizer.step()


def test_crt_is_a_linear_classifier_of_the_stage_one_features(stage_one, features):
    h, labels, trained = features
    model, fresh = new_model(), new_model().head
    new_trainer(FineTuning(str(stage_one), **CRT)).fit(model, full_batch())
    descend(lambda: fresh(h), fresh.parameters(), labels)
    assert_close(model.head.weight, fresh.weight, rtol=0, atol=1e-5)
    assert_close(model.head.bias, fresh.bias, rtol=0, atol=1e-5)
    for name, value in trained.backbone.state_dict().items():  # in spite of weight decay; BatchNorm's statistics, too
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_lws_learns_a_scale_for_each_class_of_the_stage_one_head(stage_one, features):
    h, labels, trained = features
    model = new_model(head=ScaledLinearHead)
    new_trainer(FineTuning(str(stage_one), **LWS)).fit(model, full_batch())
    scale = torch.ones(10, requires_grad=True)
    with torch.no_grad():
        old_logits = h @ trained.head.weight.T + trained.head.bias
    descend(lambda: scale * old_logits, [scale], labels)
    assert (scale - 1).abs().max() > 0.1  # it has learnt something
    assert_close(model.head.class_scale, scale, rtol=0, atol=1e-5)
    assert torch.equal(model.head.linear.weight, trained.head.weight)
    assert torch.equal(model.head.linear.bias, trained.head.bias)


def smoothed_cross_entropy(logits, labels):
    """Label-aware smoothing as the authors' code has it, from 0.4 for the most frequent class to 0.1 for the rarest."""
    n = torch.bincount(labels).float()
    smoothing = (0.1 + 0.3 * torch.sin((n - n.min()) * torch.pi / (2 * (n.max() - n.min()))))[labels]
    log_p = logits.log_softmax(1)
    own = log_p.gather(1, labels[:, None])[:, 0]
    return -((1 - smoothing) * own + smoothing * log_p.mean(1)).mean()


def test_mislas_learns_the_old_head_at_its_own_rate_and_a_scale_for_each_class(stage_one, features):
    h, labels, trained = features
    loss = partial(LabelAwareSmoothingLoss, head_smoothing=0.4, tail_smoothing=0.1)
    model = new_model(head=ScaledLinearHead, loss=loss, lr_scale={"head.linear": 0.2})
    new_trainer(FineTuning(str(stage_one), **MISLAS)).fit(model, full_batch())
    linear, scale = trained.head, torch.ones(10, requires_grad=True)
    groups = [{"params": linear.parameters(), "lr": 0.02}, {"params": [scale]}]
    descend(lambda: scale * linear(h), groups, labels, cost=smoothed_cross_entropy)
    assert_close(model.head.class_scale, scale, rtol=0, atol=1e-5)
    assert_close(model.head.linear.weight, linear.weight, rtol=0, atol=1e-5)
    assert_close(model.head.linear.bias, linear.bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("freeze_statistics", [True, False])
def test_the_statistics_of_a_frozen_part_move_on_only_where_they_are_not_frozen(freeze_statistics, stage_one):
    model, data = new_model(), full_batch()
    new_trainer(FineTuning(str(stage_one), **CRT, freeze_statistics=freeze_statistics)).fit(model, data)
    backbone = Classifier.load_from_checkpoint(stage_one).backbone.train(not freeze_statistics)
    images, _ = data.eval_transform(next(iter(data.eval_dataloader("train"))))
    with torch.no_grad():
        for _ in range(3):
            backbone(images)
    for name, value in backbone.state_dict().items():
        assert_close(model.backbone.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Modes(Callback):
    """Whether a module of the backbone, or one of the head, was in training mode at each batch."""

    def __init__(self):
        self.seen = set()

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.add((any(m.training for m in pl_module.backbone.modules()), pl_module.head.training))


def test_a_frozen_part_stays_in_evaluation_mode_after_every_validation(stage_one):
    modes = Modes()
    trainer = new_trainer(
        FineTuning(str(stage_one), **CRT), modes, max_epochs=2, num_sanity_val_steps=2, limit_val_batches=1,
        val_check_interval=0.5,
    )  # fmt: skip
    trainer.fit(new_model(), Digits(imbalance_ratio=20, batch_size=100))
    assert modes.seen == {(False, True)}


def test_a_part_of_the_backbone_can_be_frozen_without_any_checkpoint():
    model, before = new_model(), new_model().backbone.state_dict()
    new_trainer(FineTuning(freeze=["layer1"]), max_epochs=1).fit(model, Digits(imbalance_ratio=20, batch_size=100))
    changed = {name for name, value in model.backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert not any(name.startswith("layer1.") for name in changed)
    assert any(name.startswith("layer2.") for name in changed)


@pytest.fixture(scope="module")
def trained_run(etflight_command, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    fit = ["fit", *DIGITS, "--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss", "--name", "ce"]
    result = etflight_command(*fit, "--trainer.max_epochs", 1, cwd=cwd)
    assert result.status == 0, result.err
    return cwd / "runs/ce/checkpoints/last.ckpt"


def options(checkpoint, load, freeze):
    load = ", ".join(f'"{source}": "{target}"' for source, target in load.items())
    given = {"checkpoint": checkpoint, "load": f"{{{load}}}", "freeze": f"[{', '.join(freeze)}]"}
    return [argument for name, value in given.items() for argument in (f"--fine_tuning.{name}", value)]


@pytest.mark.parametrize(("head", "parts"), [("LinearHead", CRT), ("ScaledLinearHead", LWS)])
def test_a_killed_second_stage_resumes_bit_by_bit_without_the_first(
    head, parts, trained_run, etflight_command, tmp_path
):
    moved = tmp_path / "stage_one.ckpt"
    moved.write_bytes(trained_run.read_bytes())
    fit = [
        "fit", *DIGITS, "--model.head", head, "--model.loss", "CrossEntropyLoss", "--checkpoint.every_n_steps", 1,
        "--trainer.val_check_interval", 0.5, *options(moved, **parts),
    ]  # fmt: skip
    whole = etflight_command(*fit, "--name", "whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    kill = [*KILL, 18, "--trainer.callbacks.mark", "killed.mark"]
    assert etflight_command(*fit, "--name", "killed", *kill, cwd=tmp_path).status == -9
    moved.unlink()
    resumed = etflight_command(*fit, "--name", "killed", "--ckpt_path", "last", cwd=tmp_path)
    assert resumed.status == 0, resumed.err
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/killed")
    states = read(tmp_path / "runs/killed")["optimizer_states"][0]["state"]
    assert len(states) == (2 if head == "LinearHead" else 1)  # weight and bias; the scales
    test = ["test", "--data", "Digits", "--name", "killed", "--ckpt_path", "last", *options(moved, **parts)]
    tested = etflight_command(*test, *CPU, cwd=tmp_path)  # which has no use for the first stage either
    assert tested.status == 0, tested.err


def test_two_processes_learn_what_one_does(etflight_command, tmp_path):
    recipe = [
        *CPU, "--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", GLOBAL_BATCH, "--model.backbone", "test_vit",
        "--model.model_kwargs", '{"img_size": 8, "patch_size": 4}', "--model.loss", "CrossEntropyLoss", "--model.optimizer.lr", 0.05,
    ]  # fmt: skip
    first = ["fit", *recipe, "--model.head", "LinearHead", "--trainer.max_epochs", 1, "--name", "ce"]
    assert etflight_command(*first, cwd=tmp_path).status == 0
    fit = [
        "fit", *recipe, "--model.head", "ScaledLinearHead", "--trainer.max_epochs", 2, "--data.sampler", "balanced",
        *options("runs/ce/checkpoints/last.ckpt", **LWS),
    ]  # fmt: skip
    one = etflight_command(*fit, "--name", "one", cwd=tmp_path)
    assert one.status == 0, one.err
    printed = finish(start("etflight", *fit, *shared_by(2), "--name", "two", cwd=tmp_path))
    assert printed.count("weights of backbone, head taken from") == 1
    assert_same_rows(rows(tmp_path / "runs/two"), rows(tmp_path / "runs/one"))
    assert_same_weights(weights(tmp_path / "runs/two"), weights(tmp_path / "runs/one"))


def refused(model, checkpoint=None, load=None, freeze=()):
    with pytest.raises(UserError) as error:
        new_trainer(FineTuning(checkpoint and str(checkpoint), load, freeze)).fit(model, full_batch())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(stage_one, tmp_path):
    assert "gone.ckpt does not exist" in refused(new_model(), tmp_path / "gone.ckpt", **CRT)
    assert "backbone resnet20_cifar, this model test_vit" in refused(new_model(VIT), stage_one, **CRT)
    wide = new_model(model_kwargs={"width": 2})
    assert "backbone of checkpoint" in (message := refused(wide, stage_one, **CRT))
    assert "not [32, 1, 3, 3]" in message
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}, "hyper_parameters": {"lr": 1}}, foreign)
    assert "its hyper_parameters have no num_classes" in refused(new_model(), foreign, **CRT)
    content = torch.load(stage_one, weights_only=True)
    content["hyper_parameters"]["num_classes"] = 7
    content["class_names"] = None
    torch.save(content, tmp_path / "seven.ckpt")
    assert "num_classes 7, this model 10" in refused(new_model(), tmp_path / "seven.ckpt", **CRT)


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (ETFHead, "it has no bias"),
        (CosineHead, "it has no bias"),
        (partial(LinearHead, use_bias=False), "it has no bias"),
        (partial(LinearHead, feature_batch_norm=True), "it has a batch_norm"),
    ],
)
def test_lws_refuses_a_head_that_is_not_linear(head, reason, tmp_path):
    path = tmp_path / "head.ckpt"
    trainer = new_trainer(limit_train_batches=0)
    trainer.fit(new_model(head=head), full_batch())
    trainer.save_checkpoint(path)
    message = refused(new_model(head=ScaledLinearHead), path, **LWS)
    assert f"head of checkpoint {path} does not fit head.linear of this model: {reason}" in message


def test_parts_that_are_not_there_are_refused_in_one_line(stage_one):
    assert "has no such part" in refused(new_model(), stage_one, {"backbon": "backbone"})
    assert "did you mean backbone" in refused(new_model(), stage_one, {"backbone": "backbon"})
    assert "did you mean layer1" in refused(new_model(), freeze=["layer11"])
    assert "nothing is left to train" in refused(new_model(), freeze=["backbone", "head"])


def test_a_checkpoint_and_what_to_take_from_it_belong_together(stage_one):
    with pytest.raises(UserError, match=r"a checkpoint, but no load"):
        FineTuning("last.ckpt")
    with pytest.raises(UserError, match=r"a load, but no checkpoint: give --fine_tuning\.checkpoint"):
        FineTuning(load={"backbone": "backbone"})


def test_a_mistake_on_the_command_line_is_one_line(etflight_command, tmp_path):
    for given, reason in (
        (options("gone.ckpt", **CRT), "gone.ckpt does not exist"),
        (["--fine_tuning.checkpoint", "gone.ckpt"], "give --fine_tuning.load"),
    ):
        result = etflight_command("fit", *DIGITS, *given, cwd=tmp_path)
        assert result.status == 1
        assert len(result.error_lines) == 1
        assert reason in result.error_lines[0]
