"""Under averaged weights, whatever was fitted or measured at a validation belongs to the weights that were validated and saved."""

import math

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from scipy.optimize import minimize_scalar

from etflight import Classifier, callbacks
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from tests.metrics import oracle
from tests.training import new_trainer, seen


def fitted(tmp_path, use_buffers, ema_first):
    torch.manual_seed(0)
    data = Digits(max_count=20, val_fraction=0.3, batch_size=32)
    last, ema = callbacks.LastCheckpoint(), EMAWeightAveraging(decay=0.9, use_buffers=use_buffers)
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


@pytest.mark.parametrize(("use_buffers", "ema_first"), [(True, True), (False, False)])
def test_the_checkpoint_has_the_temperature_and_the_numbers_of_its_own_weights(tmp_path, use_buffers, ema_first):
    data, trainer, trained, watch, raw = fitted(tmp_path, use_buffers, ema_first)
    model = Classifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    model.eval()
    data.trainer = None
    features, embeddings, logits, labels = seen(data, "val", model.features, model.embed, model)

    def loss(log_t):
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels).item()

    best = math.exp(minimize_scalar(loss, bounds=(math.log(0.002), math.log(100)), method="bounded").x)
    assert float(model.temperature) == pytest.approx(best, rel=0.02)
    assert float(trained.temperature) == float(model.temperature)  # the model that training leaves in memory
    assert watch.measured_weights == "averaged"
    logged = trainer.callback_metrics
    assert float(logged["val/acc"]) == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert float(logged["val/loss"]) == pytest.approx(
        0.5 * ((logits.gather(1, labels[:, None]) - 1) ** 2).mean().item(), rel=1e-4
    )
    assert watch.history["nc/val/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)
    assert raw.history["nc_raw/val/nc1"][-1] == pytest.approx(nc1(features, labels), rel=1e-3)
    embeddings, labels = seen(data, "train", model.embed)
    assert watch.history["nc/train/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)
