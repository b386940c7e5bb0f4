"""Under averaged weights, whatever was fitted or measured at a validation belongs to the weights that were validated and saved."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging
from scipy.optimize import minimize_scalar

from etflight import Classifier, callbacks
from etflight.callbacks import ExponentialMovingAverage
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from etflight.utils.errors import UserError
from tests.metrics import oracle
from tests.training import new_trainer, seen


def fitted(tmp_path, ema, ema_first):
    torch.manual_seed(0)
    data = Digits(max_count=20, val_fraction=0.3, batch_size=32)
    last = callbacks.LastCheckpoint()
    watch, raw = callbacks.NeuralCollapseMonitor(), callbacks.NeuralCollapseMonitor(space="backbone")
    ours = [
        callbacks.StopSignals(last), last, callbacks.FineTuning(freeze=["layer1"], unfreeze_epoch=1), watch, raw,
        callbacks.CollapseFigures(every_n_epochs=2), callbacks.DeferredBalance(epoch=1, class_balance="batch"),
    ]  # fmt: skip
    order = [ema, *ours] if ema_first else [*ours, ema]
    trainer = new_trainer(*order, max_epochs=2, logger=MetricsCSV(tmp_path), default_root_dir=tmp_path)
    model = Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1})
    trainer.fit(model, datamodule=data)
    return data, trainer, model, watch, raw


def nc1(h, y):
    return oracle.nc1(oracle.two_pass(h.double(), y, 10))


@pytest.mark.parametrize("average", [EMAWeightAveraging, ExponentialMovingAverage])
def test_the_checkpoint_has_the_temperature_and_the_numbers_of_its_own_weights(tmp_path, average):
    data, trainer, trained, watch, raw = fitted(tmp_path, average(decay=0.9), average is EMAWeightAveraging)
    model = Classifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    model.eval()
    data.trainer = None
    features, embeddings, logits, labels = seen(data, "val", model.features, model.embed, model)

    def loss(log_t):
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels).item()

    best = math.exp(minimize_scalar(loss, bounds=(math.log(0.002), math.log(100)), method="bounded").x)
    assert float(model.temperature) == pytest.approx(best, rel=0.02)
    assert float(trained.temperature) == float(model.temperature)  # the model that training leaves in memory
    logged = trainer.callback_metrics
    assert float(logged["val/acc"]) == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert float(logged["val/loss"]) == pytest.approx(
        0.5 * ((logits.gather(1, labels[:, None]) - 1) ** 2).mean().item(), rel=1e-4
    )
    assert watch.history["nc/val/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)
    assert raw.history["nc_raw/val/nc1"][-1] == pytest.approx(nc1(features, labels), rel=1e-3)
    embeddings, labels = seen(data, "train", model.embed)
    assert watch.history["nc/train/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)


class States(Callback):
    """Keeps the weights and buffers after every step."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def test_weights_and_running_statistics_are_averaged_and_what_is_constant_stays(tmp_path):
    torch.manual_seed(0)
    states, last = States(), callbacks.LastCheckpoint()
    trainer = new_trainer(
        states, last, ExponentialMovingAverage(0.8), max_epochs=2, limit_val_batches=0, default_root_dir=tmp_path
    )
    trainer.fit(
        Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1}), datamodule=Digits(max_count=20)
    )
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert len(states.after) > 3
    moved = 0
    for name, first in states.after[0].items():
        expected = first.double()
        for state in states.after[1:]:
            expected = 0.8 * expected + 0.2 * state[name].double()
        if all(torch.equal(first, state[name]) for state in states.after):
            assert torch.equal(saved[name], first), name
        elif first.is_floating_point():
            torch.testing.assert_close(saved[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
            moved += not torch.allclose(saved[name], states.after[-1][name], rtol=1e-3)
        else:
            assert torch.equal(saved[name], states.after[-1][name]), name
    assert moved > 50
    assert torch.equal(saved["head.weight"], states.after[0]["head.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(UserError, match=r"decay of the moving average is .*: give a number from 0"):
        ExponentialMovingAverage(decay)


def small():
    return Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1})


def test_each_training_has_an_average_of_its_own(tmp_path):
    ema, data = ExponentialMovingAverage(0.5), Digits(max_count=20, batch_size=32)
    models = [small() for _ in range(2)]
    for model in models:
        before = model.backbone.conv1.weight.clone()
        trainer = new_trainer(ema, max_epochs=1)
        trainer.fit(model, datamodule=data)
        assert (model.backbone.conv1.weight - before).abs().max() > 1e-3
    other = small().eval()
    (metrics,) = trainer.validate(other, datamodule=data, verbose=False)
    logits, labels = seen(data, "val", other)
    assert metrics["val/acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_an_average_is_in_double_precision_with_the_weights_and_refused_in_half():
    model, states = small(), States()
    options = {"max_epochs": 1, "limit_val_batches": 0, "limit_train_batches": 2}
    new_trainer(states, ExponentialMovingAverage(0.8), precision="64-true", **options).fit(model, Digits(batch_size=32))
    first, second = (state["backbone.conv1.weight"] for state in states.after)
    torch.testing.assert_close(model.backbone.conv1.weight.detach(), 0.8 * first + 0.2 * second, rtol=1e-14, atol=0)
    with pytest.raises(UserError, match=r"needs weights in float32: give --trainer.precision bf16-mixed"):
        new_trainer(ExponentialMovingAverage(), precision="bf16-true", **options).fit(small(), Digits())
