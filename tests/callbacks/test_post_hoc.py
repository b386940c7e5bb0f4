"""Heads found after training: by hand, on two processes, refused; and results that have a place of their own."""

import copy
import json
import math
import shutil
from functools import partial

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CosineHead, CrossEntropyLoss, ETFHead, LinearHead, ScaledLinearHead
from etflight.callbacks import FitTemperature, NearestClassMean, PostHoc, TauNormalization
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests import training
from tests.left_by_runs import contents

new_trainer = partial(training.new_trainer, max_epochs=1, limit_val_batches=0)


def long_tailed(**options):
    return Digits(imbalance_ratio=20, **{"max_count": 60, "batch_size": 100, **options})


def new_model(head):
    return Classifier(10, "resnet20_cifar", head, CrossEntropyLoss, in_chans=1)


def trained(head=LinearHead):
    seed_everything(0, verbose=False)
    model = new_model(head)
    new_trainer().fit(model, long_tailed())
    return model.eval()


@pytest.fixture(scope="module")
def linear():
    return trained()


def embeddings(model, split):
    """In float64, and their labels."""
    found, labels = training.seen(long_tailed(), split, model.embed)
    return found.double(), labels


def assert_decides_by(logits, labels, model, method):
    """The logits are those of the test images: predictions and results follow from them."""
    probabilities = torch.cat(new_trainer(method).predict(model, long_tailed()))
    # float32 rounds a logit by its size, and a probability by as much
    assert_close(probabilities.double(), logits.softmax(1), rtol=max(1e-4, 1e-6 * float(logits.abs().max())), atol=1e-6)
    results = new_trainer(method).test(model, long_tailed(), verbose=False)[0]
    assert results["test/acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert results["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)


def test_tau_normalisation_divides_class_vectors_by_a_power_of_their_norms_and_drops_the_biases(linear):
    h, labels = embeddings(linear, "test")
    model = copy.deepcopy(linear)
    with torch.no_grad():
        model.head.weight[9] *= 3  # norms that differ more than an epoch makes them
    W = model.head.weight.detach().double()
    norms = [w.square().sum().sqrt() for w in W]
    scale = math.prod(norms) ** (0.7 / 10)  # that of the trained logits, which decides nothing
    logits = scale * torch.stack([h @ w / norm**0.7 for w, norm in zip(W, norms, strict=True)], dim=1)
    assert_decides_by(logits, labels, model, TauNormalization(0.7))


def test_tau_normalisation_takes_the_scaled_class_vectors_of_lws():
    model = trained(ScaledLinearHead)
    h, labels = embeddings(model, "test")
    W = (model.head.class_scale[:, None] * model.head.linear.weight).detach().double()
    scale = torch.linalg.vector_norm(W, dim=1).log().mean().exp()
    assert_decides_by(scale * F.linear(h, F.normalize(W)), labels, model, TauNormalization())


def logits_of_class_means(model):
    """Cosines with the class means, times the scale at which the softmax of an embedding on its mean is 0.99 on average."""
    (train, train_labels), (h, labels) = embeddings(model, "train"), embeddings(model, "test")
    means = F.normalize(torch.stack([train[train_labels == k].mean(0) for k in range(10)]))
    between = (means @ means.T)[~torch.eye(10, dtype=bool)].mean()
    scale = math.log(9 * 0.99 / 0.01) / (1 - between)
    return scale * torch.stack([F.cosine_similarity(h, mean[None]) for mean in means], dim=1), labels


@pytest.mark.parametrize("head", [LinearHead, partial(ETFHead, scale=16.0)])
def test_ncm_decides_by_the_cosine_with_the_class_means_of_the_training_images(head):
    model = trained(head)
    assert_decides_by(*logits_of_class_means(model), model, NearestClassMean())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_has_its_head_and_its_temperature_again_afterwards(fails, linear, monkeypatch):
    model = copy.deepcopy(linear)
    model.temperature.fill_(2.5)
    head, state = model.head, {name: value.clone() for name, value in model.head.state_dict().items()}
    if fails:
        monkeypatch.setattr(model, "test_step", lambda *_: 1 / 0)
    for method in (TauNormalization(), NearestClassMean()):
        try:
            new_trainer(method).test(model, long_tailed(), verbose=False)
        except ZeroDivisionError:
            assert fails
        assert model.head is head
        assert all(torch.equal(head.state_dict()[name], value) for name, value in state.items())
        assert model.temperature == 2.5


class MyHead(LinearHead):
    """A head of the user's own, whose embedding no head of etflight's has."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)
        self.embedder = torch.nn.Tanh()


@pytest.mark.parametrize("method", [TauNormalization(), NearestClassMean()], ids=["tau", "means"])
@pytest.mark.parametrize("head", [LinearHead, partial(LinearHead, batch_norm=True, normalize=True), MyHead])
def test_a_method_applied_to_a_model_is_an_ordinary_classifier_with_its_temperature(head, method, tmp_path):
    model = trained(head)
    data = long_tailed(val_fraction=0.2)
    model.fingerprint, model.class_counts = None, torch.zeros(10, dtype=torch.long)
    fit = new_trainer()
    fit.fit(model, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = method.applied(model, data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert found.is_calibrated
    images = torch.randn(8, 1, 8, 8)
    expected = torch.cat(new_trainer(method, FitTemperature()).predict(model, data))
    test = torch.cat([data.eval_transform(batch)[0] for batch in data.eval_dataloader("test")])
    with torch.no_grad():
        assert_close(found.probabilities(test), expected, rtol=1e-4, atol=1e-6)
        if head is MyHead:
            return
        trainer = new_trainer()
        trainer.strategy.connect(found)
        trainer.save_checkpoint(tmp_path / "c.ckpt", weights_only=True)
        again = Classifier.load_from_checkpoint(tmp_path / "c.ckpt").eval()
        assert again.is_calibrated
        assert_close(again.probabilities(images), found.probabilities(images), rtol=0, atol=0)


# --- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [-0.1, float("nan"), float("inf")])
def test_a_negative_or_infinite_tau_is_refused(tau):
    with pytest.raises(UserError, match=f"tau must be finite and not negative, got {tau}"):
        TauNormalization(tau)


def test_heads_and_images_that_do_not_go_with_a_method_are_refused_in_one_line(linear):
    for model, method, data, message in (
        (new_model(ETFHead), TauNormalization(), long_tailed(), "ETFHead have norms that decide nothing"),
        (new_model(CosineHead), TauNormalization(), long_tailed(), "CosineHead have norms that decide nothing"),
        (linear, NearestClassMean(), Digits(max_count=60), "trained on 43: give the data options"),
    ):
        with pytest.raises(UserError, match=message) as error:
            new_trainer(method).test(model, data, verbose=False)
        assert "\n" not in str(error.value)


# --- the command line --------------------------------------------------------------------------------------------------


class Contrary(PostHoc):
    """Decides for the least likely class."""

    def new_head(self, trainer, model):
        head = LinearHead(model.head.in_features, model.head.num_classes)
        head.load_state_dict({name: -value for name, value in model.head.state_dict().items()})
        return head


DATA = ["--data=Digits", "--data.imbalance_ratio=20", "--data.max_count=40", "--trainer.accelerator=cpu"]
FIT = ["fit", *DATA, "--model.backbone=resnet20_cifar", "--model.head=LinearHead", "--model.loss=CrossEntropyLoss"]


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    """A folder with a run that was trained and tested, and the arguments that test its checkpoint."""
    cwd = tmp_path_factory.mktemp("run")
    few = ["--monitor=null", "--trainer.max_epochs=1", "--seed_everything=3"]
    assert etflight_command(*FIT, *few, "--name=ce", cwd=cwd).status == 0
    etflight_command.succeed("test", *DATA, "--ckpt_path", "runs/ce/checkpoints/last.ckpt", cwd=cwd)
    return cwd, [*DATA, "--ckpt_path", cwd / "runs/ce/checkpoints/last.ckpt"]


@pytest.mark.parametrize(
    "method", [["--post_hoc=NearestClassMean"], ["--model.logit_adjustment=1.0"], ["--model.adjustment=multiplicative"]]
)
def test_results_of_another_decision_never_go_to_the_run_of_the_checkpoint(method, run, etflight_command):
    cwd, of_checkpoint = run
    before = contents(cwd / "runs/ce")
    name = f"by_{method[0].rpartition('=')[2]}"
    etflight_command.succeed("test", *of_checkpoint, *method, "--name", name, cwd=cwd)
    own = cwd / "runs" / name
    assert {path.name for path in own.iterdir()} >= {"config.yaml", "run.json", "test_metrics.json", "per_class.csv"}
    record = json.loads((own / "run.json").read_text())
    assert record["seed"] == 3  # of the training
    assert record["data"] == json.loads((cwd / "runs/ce/run.json").read_text())["data"]
    assert record["checkpoint"] == str(of_checkpoint[-1])
    etflight_command.succeed("report", "runs/ce", f"runs/{name}", cwd=cwd)
    for given in (["--name", "ce"], ["--name", "ce", "--ckpt_path", "last"]):
        refused = etflight_command("test", *of_checkpoint, *method, *given, cwd=cwd)
        refused.assert_refused("own results stay as they are: give the checkpoint by its path, and another --name")
    assert contents(cwd / "runs/ce") == before


def test_a_training_of_its_own_is_no_place_for_the_results_of_another_checkpoint(run, etflight_command):
    cwd, of_checkpoint = run
    shutil.copytree(cwd / "runs/ce", cwd / "runs/other")
    before = contents(cwd / "runs/other")
    refused = etflight_command("test", *of_checkpoint, "--name", "other", cwd=cwd)
    refused.assert_refused("runs/other holds a training, whose own results stay as they are: give a new --name")
    assert contents(cwd / "runs/other") == before


def test_a_user_method_decides_predictions_too(run, etflight_command):
    cwd, of_checkpoint = run
    contrary = ["--post_hoc", "tests.callbacks.test_post_hoc.Contrary", "--name", "contrary"]
    result = etflight_command.succeed("predict", *of_checkpoint, *contrary, cwd=cwd)
    assert (cwd / "runs/contrary/predictions.csv").is_file()
    assert "Contrary decides in place of the trained LinearHead" in result.out + result.err


def test_logits_of_another_head_are_not_adjusted(run, etflight_command):
    cwd, of_checkpoint = run
    both = ["--post_hoc", "NearestClassMean", "--model.logit_adjustment", 1, "--name", "both"]
    refused = etflight_command("test", *of_checkpoint, *both, cwd=cwd)
    refused.assert_refused("logit_adjustment 1 is for the logits of the trained head", "--model.logit_adjustment 0")


def test_training_with_a_post_hoc_method_is_one_line_and_leaves_nothing(etflight_command, tmp_path):
    result = etflight_command(*FIT, "--post_hoc", "NearestClassMean", cwd=tmp_path)
    result.assert_refused("takes a trained model and trains nothing: etflight test")
    assert not (tmp_path / "runs").exists()


def test_another_model_or_other_data_are_refused_in_one_line():
    images = DataLoader(TensorDataset(torch.randn(4, 1, 8, 8), torch.arange(4)), batch_size=4)
    with pytest.raises(UserError, match=r"replaces the head of an etflight\.Classifier, not of a BoringModel"):
        new_trainer(callbacks=[TauNormalization()]).test(BoringModel())
    with pytest.raises(UserError, match="NearestClassMean takes the training images from a data module"):
        new_trainer(callbacks=[NearestClassMean()]).test(Classifier(4, "resnet20_cifar", in_chans=1), images)
