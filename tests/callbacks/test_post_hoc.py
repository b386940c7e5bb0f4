"""Heads found after training: by hand, on two processes, refused; and results that have a place of their own."""

import copy
import json
from functools import partial

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from torch.nn import functional as F
from torch.testing import assert_close

from etflight import Classifier, CosineHead, CrossEntropyLoss, ETFHead, LinearHead, ScaledLinearHead
from etflight.callbacks import NearestClassMean, PostHoc, TauNormalization
from etflight.callbacks.post_hoc import class_means
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.system.test_ddp import CPU, finish, start
from tests.system.test_resume import DIGITS


def long_tailed(**options):
    return Digits(imbalance_ratio=20, batch_size=100, **options)


def new_trainer(*callbacks, **options):
    return Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **{"max_epochs": 2, "num_sanity_val_steps": 0, "limit_val_batches": 0, **options},
    )  # fmt: skip


def trained(head=LinearHead):
    seed_everything(0, verbose=False)
    model = Classifier(10, in_chans=1, backbone="resnet20_cifar", head=head, loss=CrossEntropyLoss)
    new_trainer().fit(model, long_tailed())
    return model.eval()


@pytest.fixture(scope="module")
def linear():
    return trained()


def seen(model, split):
    """Embeddings, logits and labels, in float64."""
    data = long_tailed()
    batches = [data.eval_transform(batch) for batch in data.eval_dataloader(split)]
    with torch.no_grad():
        h, z = (torch.cat([f(images) for images, _ in batches]).double() for f in (model.embed, model))
    return h, z, torch.cat([labels for _, labels in batches])


def decide(model, method):
    """Probabilities `[B, K]` of the test images, and the test's results."""
    probabilities = torch.cat(new_trainer(method).predict(model, long_tailed()))
    return probabilities.double(), new_trainer(method).test(model, long_tailed(), verbose=False)[0]


def assert_decides_by(logits, labels, probabilities, results):
    assert_close(probabilities, logits.softmax(1), rtol=1e-4, atol=1e-6)
    assert results["test/acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert results["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_tau_normalisation_divides_class_vectors_by_a_power_of_their_norms_and_drops_the_biases(tau, linear):
    h, _, labels = seen(linear, "test")
    model = copy.deepcopy(linear)
    with torch.no_grad():
        model.head.weight[9] *= 3  # norms that differ more than two epochs make them
    W = model.head.weight.detach().double()
    logits = torch.stack([h @ w / w.square().sum().sqrt() ** tau for w in W], dim=1)
    assert_decides_by(logits, labels, *decide(model, TauNormalization(tau)))


def test_tau_normalisation_takes_the_scaled_class_vectors_of_lws():
    model = trained(ScaledLinearHead)
    h, _, _ = seen(model, "test")
    W = (model.head.class_scale[:, None] * model.head.linear.weight).detach().double()
    assert_close(decide(model, TauNormalization())[0], F.linear(h, F.normalize(W)).softmax(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", [LinearHead, partial(ETFHead, scale=16.0), CosineHead])
def test_ncm_decides_by_the_cosine_with_the_class_means_of_the_training_images(head):
    model = trained(head)
    (train, _, train_labels), (h, _, labels) = seen(model, "train"), seen(model, "test")
    means = torch.stack([train[train_labels == k].mean(0) for k in range(10)])
    cosines = torch.stack([F.cosine_similarity(h, mean[None]) for mean in means], dim=1)
    assert_decides_by(cosines, labels, *decide(model, NearestClassMean()))


def test_the_model_has_its_head_and_its_temperature_again_afterwards(linear):
    linear.temperature.fill_(2.5)
    head, state = linear.head, {name: value.clone() for name, value in linear.state_dict().items()}
    for method in (TauNormalization(), NearestClassMean()):
        decide(linear, method)
        assert linear.head is head
        assert linear.state_dict().keys() == state.keys()
        # metrics of the test are states, too
        assert all(torch.equal(linear.state_dict()[name], value) for name, value in state.items() if "." not in name)
        assert linear.temperature == 2.5
    linear.temperature.fill_(1.0)


def test_a_failed_evaluation_gives_the_head_back_as_well(linear, monkeypatch):
    head = linear.head
    monkeypatch.setattr(linear, "test_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        new_trainer(TauNormalization()).test(linear, long_tailed(), verbose=False)
    assert linear.head is head


def means_of_a_share(rank, state, batch_size):
    torch.manual_seed(0)
    model = Classifier(10, in_chans=1, backbone="resnet20_cifar", head=LinearHead, loss=CrossEntropyLoss)
    model.load_state_dict(state)
    trainer = Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    data = Digits(imbalance_ratio=20, batch_size=batch_size)
    data.trainer = trainer
    return class_means(trainer, model.eval(), data)


def test_class_means_are_those_of_all_images_whatever_the_batches_and_the_processes(linear, two_ready_processes):
    h, _, labels = seen(linear, "train")
    expected = torch.stack([h[labels == k].mean(0) for k in range(10)])
    for batch_size in (7, 500):
        alone = class_means(new_trainer(), linear, Digits(imbalance_ratio=20, batch_size=batch_size))
        assert alone.dtype == torch.float64
        assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    for means in two_ready_processes(means_of_a_share, [(linear.state_dict(), 30)] * 2):
        assert_close(means, expected, rtol=1e-5, atol=1e-5)


# --- refused -----------------------------------------------------------------------------------------------------------


def refused(model, method, data):
    with pytest.raises(UserError) as error:
        new_trainer(method).test(model, data, verbose=False)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
def test_a_tau_that_cannot_be_is_refused(tau):
    with pytest.raises(UserError, match=f"tau must be finite and not negative, got {tau}"):
        TauNormalization(tau)


@pytest.mark.parametrize("head", [ETFHead, CosineHead])
def test_tau_normalisation_refuses_class_vectors_whose_norms_decide_nothing(head):
    model = Classifier(10, in_chans=1, backbone="resnet20_cifar", head=head, loss=CrossEntropyLoss)
    assert f"{head.__name__} have norms that decide nothing" in refused(model, TauNormalization(), long_tailed())


def test_ncm_refuses_other_training_images_than_the_checkpoints(linear):
    message = refused(linear, NearestClassMean(), Digits())
    assert (
        "132 training images of class 1, but the checkpoint was trained on 91: give the data options of its training"
        in message
    )


def test_nothing_is_replaced_in_training(linear):
    with pytest.raises(UserError, match=r"takes a trained model and trains nothing: etflight test"):
        new_trainer(TauNormalization()).fit(linear, long_tailed())


# --- the command line --------------------------------------------------------------------------------------------------


class Contrary(PostHoc):
    """Decides for the least likely class."""

    def new_head(self, trainer, model):
        head = LinearHead(model.head.in_features, model.head.num_classes)
        head.load_state_dict({name: -value for name, value in model.head.state_dict().items()})
        return head


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("run")
    fit = ["fit", *DIGITS, "--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss", "--name", "ce"]
    assert etflight_command(*fit, "--seed_everything", 3, "--trainer.max_epochs", 1, cwd=cwd).status == 0
    test = ["test", "--data", "Digits", "--data.imbalance_ratio", 20, *CPU]
    tested = etflight_command(*test, "--ckpt_path", "runs/ce/checkpoints/last.ckpt", cwd=cwd)
    assert tested.status == 0, tested.err
    return cwd, [*test, "--ckpt_path", cwd / "runs/ce/checkpoints/last.ckpt"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


METHODS = [
    ["--post_hoc", "TauNormalization", "--post_hoc.tau", 0.5],
    ["--post_hoc", "NearestClassMean"],
    ["--model.logit_adjustment", 1.0],
    ["--post_hoc", "tests.callbacks.test_post_hoc.Contrary"],
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: str(method[1]))
def test_results_of_another_decision_never_go_to_the_run_of_the_checkpoint(method, run, etflight_command):
    cwd, test = run
    before = contents(cwd / "runs/ce")
    name = f"by_{str(method[1]).rpartition('.')[2]}"
    result = etflight_command(*test, *method, "--name", name, cwd=cwd)
    assert result.status == 0, result.err
    own = cwd / "runs" / name
    assert {path.name for path in own.iterdir()} >= {"config.yaml", "run.json", "test_metrics.json", "per_class.csv"}
    record = json.loads((own / "run.json").read_text())
    assert record["seed"] == 3  # of the training
    assert record["data"] == json.loads((cwd / "runs/ce/run.json").read_text())["data"]
    assert record["checkpoint"] == str(test[-1])
    report = etflight_command("report", "runs/ce", f"runs/{name}", cwd=cwd)
    assert report.status == 0, report.err
    for given in (["--name", "ce"], ["--name", "ce", "--ckpt_path", "last"]):
        refused = etflight_command(*test, *method, *given, cwd=cwd)
        assert refused.status == 1
        assert len(refused.error_lines) == 1
        assert "own results stay as they are: give the checkpoint by its path, and another --name" in refused.err
    assert contents(cwd / "runs/ce") == before


def test_a_training_of_its_own_is_no_place_for_the_results_of_another_checkpoint(run, etflight_command):
    cwd, test = run
    other = [*DIGITS, "--trainer.max_epochs", 1, "--name", "other"]
    assert etflight_command("fit", *other, cwd=cwd).status == 0
    before = contents(cwd / "runs/other")
    result = etflight_command(*test, "--name", "other", cwd=cwd)
    assert result.status == 1
    assert "runs/other holds a training, whose own results stay as they are: give a new --name" in result.err
    assert contents(cwd / "runs/other") == before


def test_a_user_method_decides_predictions_too(run, etflight_command):
    cwd, test = run
    predict = ["predict", *test[1:], "--post_hoc", "tests.callbacks.test_post_hoc.Contrary", "--name", "contrary"]
    result = etflight_command(*predict, cwd=cwd)
    assert result.status == 0, result.err
    assert (cwd / "runs/contrary/predictions.csv").is_file()
    assert "Contrary decides in place of the trained LinearHead" in result.out + result.err


def test_two_processes_test_as_one_does(run, etflight_command):
    cwd, test = run
    found = {}
    for name, processes in (("one_ncm", []), ("two_ncm", ["--trainer.strategy", "ddp", "--trainer.devices", 2])):
        argv = [*test, "--post_hoc", "NearestClassMean", "--name", name, *processes]
        finish(start("etflight", *argv, cwd=cwd))
        found[name] = json.loads((cwd / "runs" / name / "test_metrics.json").read_text())
    assert found["two_ncm"] == pytest.approx(found["one_ncm"], rel=1e-5)


def test_training_with_a_post_hoc_method_is_one_line_and_leaves_nothing(etflight_command, tmp_path):
    result = etflight_command("fit", *DIGITS, "--post_hoc", "NearestClassMean", cwd=tmp_path)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert "trains nothing" in result.error_lines[0]
    assert not (tmp_path / "runs").exists()
