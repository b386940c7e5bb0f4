"""What Lightning offers to a training works as its users know it, or is refused in one line before anything is trained."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from torch.optim import LBFGS

from etflight import Classifier
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.left_by_runs import assert_killed_run_resumes, assert_same_run
from tests.training import QUIET, VIT, image_folder, read_csv
from tests.training import new_trainer as trainer

# 3 batches an epoch
FIT = ["fit", "--data", "Digits", "--data.max_count", 6, "--data.batch_size", 20, *QUIET, "--name"]
RESNET = ["--model.backbone", "resnet20_cifar"]
COSINE = ["--model.lr_scheduler", "WarmupCosine", "--model.lr_scheduler.warmup_epochs", 0]


# --- averaging of weights ----------------------------------------------------------------------------------------------

AVERAGING = [
    "--trainer.max_epochs", 4, "--trainer.callbacks+", "StochasticWeightAveraging", "--trainer.callbacks.swa_lrs", 0.05,
    "--trainer.callbacks.swa_epoch_start", 3, "--trainer.callbacks.annealing_epochs", 2,
]  # fmt: skip


@pytest.mark.parametrize(
    # the batch, and the rhythm of checkpoints: in the first epoch of averaging, after an epoch, after the last step
    ("options", "kills"),
    [([*RESNET, *COSINE], [(7, 1), (10, 100), (11, 1)]), (VIT, [(10, 1)])],
    ids=["BatchNorm and a schedule", "neither"],
)
def test_a_run_with_averaged_weights_has_no_epoch_more_and_is_resumed_and_repeated_bit_by_bit(
    options, kills, etflight_command, tmp_path
):
    averaging = [*options, *AVERAGING]
    shown = etflight_command(*FIT, "whole", *averaging, cwd=tmp_path).ran().out
    told = [line.partition(":")[0] for line in shown.splitlines() if line.startswith("epoch")]
    assert told == [f"epoch {epoch}/4" for epoch in (1, 2, 3, 4)]
    for table in ("metrics.csv", "speed.csv"):
        assert {float(row["epoch"]) for row in read_csv(tmp_path / "runs/whole" / table)} == {0, 1, 2, 3}
    for after, every in kills:
        assert_killed_run_resumes(etflight_command, tmp_path, [*FIT[:-1], *averaging], after, every)
    etflight_command("fit", "-c", "runs/whole/config.yaml", "--name", "again", cwd=tmp_path).ran()
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/again")


# --- LBFGS -------------------------------------------------------------------------------------------------------------


def small(**options):
    torch.manual_seed(0)
    return Classifier(10, "resnet20_cifar", in_chans=1, optimizer=partial(LBFGS, lr=0.5, max_iter=3), **options)


def test_a_step_of_lbfgs_is_torchs_own():
    data, model = Digits(batch_size=64), small()
    expected = copy.deepcopy(model)
    expected.backbone.to(memory_format=torch.contiguous_format)
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(model, datamodule=data)

    images, labels = data.train_transform(next(iter(Digits(batch_size=64).train_dataloader())), 0)
    optimizer = LBFGS([p for p in expected.parameters() if p.requires_grad], lr=0.5, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = expected.loss(expected(images), labels)
        loss.backward()
        return loss

    before = optimizer.step(closure).item()
    assert run.callback_metrics["train/loss"].item() == pytest.approx(before, rel=1e-5)  # the first of its evaluations
    assert closure().item() < before
    for name, value in expected.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], value, rtol=0, atol=2e-6, msg=name)


def test_a_run_with_lbfgs_clips_and_resumes(etflight_command, tmp_path):
    fit = [*RESNET, "--model.optimizer", "LBFGS", "--model.optimizer.max_iter", 4, "--trainer.gradient_clip_val", 1]
    for name, *argv in (["whole", 2], ["parts", 1], ["parts", 2, "--ckpt_path", "last"]):
        etflight_command(*FIT, name, *fit, "--trainer.max_epochs", *argv, cwd=tmp_path).ran()
    assert_same_run(tmp_path / "runs/whole", tmp_path / "runs/parts")


def train_on_two(rank):
    with pytest.raises(UserError) as refusal:
        trainer(devices=2, strategy="ddp", max_steps=1).fit(small(), datamodule=Digits(batch_size=64))
    return str(refusal.value)


def test_lbfgs_on_two_processes_is_refused_by_both(two_ready_processes):
    for message in two_ready_processes(train_on_two, [()] * 2):
        assert "LBFGS" in message


# --- what is refused ---------------------------------------------------------------------------------------------------

SPAWNED = "--trainer.strategy ddp"
REFUSED = {
    "LBFGS while gradients accumulate": (
        ["--model.optimizer", "LBFGS", "--trainer.accumulate_grad_batches", 2], "--data.batch_size"),
    "LBFGS with a rate for each layer": (
        ["--model.optimizer", "LBFGS", "--model.layer_decay", 0.5], "LBFGS"),
    "a search for a learning rate": (["--trainer.callbacks+", "LearningRateFinder"], "--model.optimizer.lr"),
    "a search for a batch size": (["--trainer.callbacks+", "BatchSizeFinder"], "--data.batch_size"),
    "averaging with a rate for each layer": ([*AVERAGING, "--model.layer_decay", 0.5], "layer_decay"),
    "averaging with a rate for a part": ([*AVERAGING, "--model.lr_scale", "{head: 0.1}"], "lr_scale"),
    "no file at all": (["--trainer.barebones", "true"], "barebones"),
    "no batch makes a step": (["--trainer.accumulate_grad_batches", 0], "--trainer.accumulate_grad_batches"),
    "an epoch that never comes": (["--trainer.check_val_every_n_epoch", 0], "--trainer.check_val_every_n_epoch"),
    "gradients turned round": (["--trainer.gradient_clip_val", -1], "--trainer.gradient_clip_val"),
    "spawned processes": (["--trainer.strategy", "ddp_spawn", "--trainer.devices", 2], SPAWNED),
    "a notebook's processes": (["--trainer.strategy", "ddp_notebook", "--trainer.devices", 2], SPAWNED),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_is_refused_in_one_line_before_training(case, etflight_command, tmp_path):
    argv, words = REFUSED[case]
    result = etflight_command(*FIT, "r", *RESNET, *argv, cwd=tmp_path)
    result.assert_refused(words)
    assert not (tmp_path / "runs/r/speed.csv").exists()


# --- loaders -----------------------------------------------------------------------------------------------------------


def test_loaders_that_are_made_anew_each_epoch_serve_the_same(etflight_command, tmp_path):
    fit = [*RESNET, "--data.sampler", "balanced", "--data.num_workers", 1, "--trainer.max_epochs", 3]
    etflight_command(*FIT, "kept", *fit, cwd=tmp_path).ran()
    etflight_command(*FIT, "anew", *fit, "--trainer.reload_dataloaders_every_n_epochs", 1, cwd=tmp_path).ran()
    assert_same_run(tmp_path / "runs/kept", tmp_path / "runs/anew")


class Labels(Callback):
    """Writes the labels of each training batch to a file."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        with open("labels.txt", "a") as file:
            print(*batch[1].tolist(), file=file)


def test_a_few_batches_to_overfit_are_always_the_same_and_of_all_classes(etflight_command, tmp_path):
    data = image_folder(tmp_path / "images", dict.fromkeys("abc", 8))  # sorted by class
    small = ["--data.batch_size", 4, "--data.num_workers", 1, *RESNET, *QUIET]
    three_times = ["--trainer.overfit_batches", 2, "--trainer.max_epochs", 3]
    labels = ["--trainer.callbacks+", "tests.system.test_trainer_options.Labels"]
    etflight_command("fit", *data, *small, *three_times, *labels, cwd=tmp_path).ran()
    batches = (tmp_path / "labels.txt").read_text().splitlines()
    assert len(batches) == 6
    assert batches[:2] == batches[2:4] == batches[4:]
    assert {*" ".join(batches[:2]).split()} == {"0", "1", "2"}
