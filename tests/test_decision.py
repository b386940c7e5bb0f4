"""What is done with logits, by NumPy, and for which decision a temperature was fitted."""

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead
from etflight.callbacks import FitTemperature
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.training import new_trainer, save_trained

COUNTS = [50, 40, 30, 20, 10, 5, 4, 3, 2, 1]
PARTS = {
    "cross-entropy": {"head": LinearHead, "loss": CrossEntropyLoss},
    "dot regression": {"head": partial(ETFHead, scale=2.0), "loss": partial(DotRegressionLoss, length=2.0)},
}


def normalised(p):
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("fitted", [None, 1.7])
def test_probabilities_are_those_of_the_loss_divided_by_frequencies_and_then_sharpened(parts, fitted):
    model = Classifier(10, "resnet20_cifar", in_chans=1, class_counts=COUNTS, logit_adjustment=0.8, **PARTS[parts])
    implied = float(model.temperature)  # until one is fitted
    if fitted is not None:
        model.set_temperature(torch.tensor(fitted))
    z = torch.randn(6, 10, generator=torch.Generator().manual_seed(0)).double()
    pi = np.array(COUNTS) / sum(COUNTS)
    implied_by_loss = normalised(np.exp(z.numpy() / implied)) / pi**0.8
    expected = normalised(normalised(implied_by_loss) ** (implied / (fitted or implied)))
    assert_close(model.calibrated(z).softmax(1), torch.from_numpy(expected), rtol=1e-5, atol=1e-8)
    assert torch.equal(model.calibrated(z).argmax(1), torch.from_numpy(implied_by_loss.argmax(1)))


def test_multiplicative_adjustment_multiplies_logits_by_a_power_of_the_frequencies():
    options = {"logit_adjustment": 0.3, "adjustment": "multiplicative", "class_counts": COUNTS}
    model = Classifier(10, "resnet20_cifar", in_chans=1, **options, **PARTS["cross-entropy"])
    z = torch.randn(6, 10).double()
    pi = np.array(COUNTS) / sum(COUNTS)
    assert_close(model.calibrated(z), torch.from_numpy(z.numpy() * pi**-0.3), rtol=1e-6, atol=1e-8)


# --- whose temperature it is ---------------------------------------------------------------------------------------------


def digits(**options):
    return Digits(**{"imbalance_ratio": 20, "val_fraction": 0.2, "batch_size": 64, **options})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a model whose temperature was fitted on held-out images, for logits that are not adjusted."""
    torch.manual_seed(0)
    model = Classifier(10, "resnet20_cifar", in_chans=1, **PARTS["cross-entropy"])
    path = tmp_path_factory.mktemp("run") / "c.ckpt"
    return save_trained(path, model, digits(), max_epochs=2, limit_val_batches=1.0)


def test_a_temperature_is_called_fitted_for_its_own_decision_only(checkpoint):
    own = Classifier.load_from_checkpoint(checkpoint)
    assert own.temperature != 1
    assert own.describe_temperature().endswith("fitted on held-out images")
    for options in ({"logit_adjustment": 1.0}, {"logit_adjustment": 0.5, "adjustment": "multiplicative"}):
        other = Classifier.load_from_checkpoint(checkpoint, **options)
        assert other.temperature == 1
        assert other.describe_temperature().startswith("no temperature fitted for this decision")


def test_a_decision_without_a_temperature_gets_one_from_held_out_images_and_never_from_test_images(checkpoint):
    model = Classifier.load_from_checkpoint(checkpoint, logit_adjustment=1.0).eval()
    data = digits()
    results = new_trainer(FitTemperature()).test(model, data, verbose=False)[0]
    images, labels = (
        torch.cat(part) for part in zip(*map(data.eval_transform, data.eval_dataloader("val")), strict=True)
    )
    with torch.no_grad():
        adjusted = model.decision.adjusted(model(images)).double()
    grid = torch.linspace(-4, 4, 801).exp().double()
    likelihoods = torch.stack([torch.nn.functional.cross_entropy(adjusted / t, labels) for t in grid])
    assert float(model.temperature) == pytest.approx(float(grid[likelihoods.argmin()]), rel=0.05)
    assert results["test/ece_calibrated"] < results["test/ece"]
    for watched in (digits(val_fraction=0.0), digits(seed=1)):  # the test images, and other training images
        model = Classifier.load_from_checkpoint(checkpoint, logit_adjustment=1.0).eval()
        new_trainer(FitTemperature()).test(model, watched, verbose=False)
        assert model.temperature == 1


def test_an_adjustment_without_training_counts_is_refused():
    model = Classifier(10, "resnet20_cifar", in_chans=1, logit_adjustment=1.0, **PARTS["cross-entropy"])
    with pytest.raises(UserError, match="logit_adjustment needs the training counts"):
        model.calibrated(torch.zeros(1, 10))
