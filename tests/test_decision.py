"""Decisions: adjustment and temperature by hand, and a temperature that is used only for what it was fitted for."""

from functools import partial

import numpy as np
import pytest
import torch

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead, NONLLoss
from etflight.data import Digits
from tests.training import new_trainer, save_trained

COUNTS = [500, 300, 200, 100, 60, 40, 20, 10, 5, 5]
T0 = (1 + 1 / 9) / np.log(9 * 0.99 / 0.01)  # of dot regression with ten classes


def model_of(**options):
    return Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1}, class_counts=COUNTS, **options)


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def normalised(p):
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [None, 0.05, 3.0])
@pytest.mark.parametrize(
    ("loss", "unit"), [(CrossEntropyLoss, 1.0), (NONLLoss, 0.1), (DotRegressionLoss, T0)], ids=["ce", "nonl", "dr"]
)
def test_an_adjustment_divides_the_probabilities_by_a_power_of_the_prior_and_a_temperature_takes_the_quotient_to_a_power(
    loss, unit, temperature
):
    model = model_of(head=ETFHead, loss=loss, logit_adjustment=1.5)
    if temperature is not None:
        model.set_temperature(torch.tensor(temperature))
    z = np.random.default_rng(0).normal(size=(50, 10)) * unit
    prior = np.array(COUNTS) / np.sum(COUNTS)
    divided = normalised(softmax(z / unit) / prior**1.5)
    power = 1.0 if temperature is None else unit / temperature
    found = model.calibrated(torch.from_numpy(z))
    np.testing.assert_allclose(found.softmax(1), normalised(divided**power), rtol=1e-5, atol=1e-12)
    assert np.array_equal(found.argmax(1), divided.argmax(1))  # whatever the temperature
    assert np.array_equal(model.decision.adjusted(torch.from_numpy(z)).argmax(1), divided.argmax(1))


def test_a_multiplicative_adjustment_multiplies_logits_before_the_temperature():
    model = model_of(head=LinearHead, loss=CrossEntropyLoss, logit_adjustment=0.5, adjustment="multiplicative")
    model.set_temperature(torch.tensor(2.0))
    z = np.random.default_rng(0).normal(size=(50, 10))
    prior = np.array(COUNTS) / np.sum(COUNTS)
    np.testing.assert_allclose(
        model.calibrated(torch.from_numpy(z)).softmax(1), softmax(z * prior**-0.5 / 2), rtol=1e-5, atol=1e-12
    )


def test_bare_logits_have_the_default_temperature_where_the_fitted_one_is_that_of_adjusted_logits():
    for tau, expected in ((0.0, 3.0), (1.0, T0)):
        model = model_of(logit_adjustment=tau)
        model.set_temperature(torch.tensor(3.0))
        assert model.decision.temperature_of_bare_logits() == pytest.approx(expected)


# --- what a temperature was fitted for ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A checkpoint with a temperature of 1.96, fitted without an adjustment, of a frame of scale 16."""
    model = model_of(head=partial(ETFHead, scale=16.0), loss=CrossEntropyLoss)
    model.set_temperature(torch.tensor(1.96))
    trainer = new_trainer()
    trainer.strategy.connect(model)
    path = tmp_path_factory.mktemp("fitted") / "m.ckpt"
    trainer.save_checkpoint(path)
    return path


ANOTHER = {
    "additive": {"logit_adjustment": 1.0},
    "multiplicative": {"logit_adjustment": 1.0, "adjustment": "multiplicative"},
    "logits of another scale": {"head": partial(ETFHead, scale=8.0)},
}


@pytest.mark.parametrize("name", ANOTHER)
def test_a_temperature_is_neither_applied_nor_called_fitted_for_another_decision(name, fitted, caplog):
    model = Classifier.load_from_checkpoint(fitted, **ANOTHER[name])
    assert float(model.temperature) == 1
    assert not model.is_calibrated
    assert "val_fraction" in model.describe_temperature()
    (line,) = [message for message in caplog.messages if "temperature 1.96 was fitted for another decision" in message]
    assert "val_fraction" in line


@pytest.mark.parametrize("same", [{}, {"adjustment": "multiplicative"}, {"loss": NONLLoss}])
def test_a_temperature_is_kept_for_the_logits_it_was_fitted_for(same, fitted, caplog):
    model = Classifier.load_from_checkpoint(fitted, **same)  # none of these changes what decides
    assert float(model.temperature) == pytest.approx(1.96)
    assert "1.96, fitted" in model.describe_temperature()
    assert not [message for message in caplog.messages if "another decision" in message]


def test_the_default_of_one_loss_is_not_called_that_of_another(tmp_path):
    path = save_trained(tmp_path / "m.ckpt", model_of(), Digits(max_count=5), limit_train_batches=1)
    assert float(Classifier.load_from_checkpoint(path).temperature) == pytest.approx(T0)
    nonl = Classifier.load_from_checkpoint(path, loss=NONLLoss)
    assert float(nonl.temperature) == pytest.approx(0.1)


def test_a_temperature_of_earlier_weights_is_forgotten_when_training_goes_on_without_held_out_images():
    model = model_of(head=LinearHead, loss=CrossEntropyLoss)
    model.set_temperature(torch.tensor(1.96))
    new_trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=0).fit(model, Digits(batch_size=16))
    assert float(model.temperature) == 1
    assert not model.is_calibrated
