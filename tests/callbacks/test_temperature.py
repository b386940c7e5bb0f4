"""The temperature of a decision that training did not make: where it is fitted, and where not."""

from functools import partial

import pytest
import torch
from torch.nn import functional as F

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks import FitTemperature
from etflight.data import Digits
from tests.training import new_trainer, save_trained, seen

images = partial(Digits, imbalance_ratio=20, max_count=60, batch_size=50)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A checkpoint of a training with held-out images."""
    torch.manual_seed(0)
    network = {"img_size": 8, "patch_size": 4}
    model = Classifier(10, "test_vit", LinearHead, CrossEntropyLoss, in_chans=1, model_kwargs=network)
    path, options = tmp_path_factory.mktemp("run") / "m.ckpt", {"max_epochs": 6, "limit_val_batches": 1.0}
    return save_trained(path, model, images(val_fraction=0.2), **options)


def test_an_adjusted_decision_gets_the_temperature_of_the_held_out_images_and_not_of_the_test_images(path):
    model = Classifier.load_from_checkpoint(path, logit_adjustment=1.0)
    result = new_trainer(FitTemperature()).test(model, images(val_fraction=0.2), verbose=False)[0]
    data = images(val_fraction=0.2)
    prior = torch.as_tensor(data.class_counts / data.class_counts.sum())
    best = {}
    for split in ("val", "test"):
        logits, labels = seen(data, split, lambda x: model.eval()(x) - prior.log())
        losses = {t: F.cross_entropy(logits / t, labels).item() for t in torch.logspace(-2, 2, 4001).tolist()}
        best[split] = min(losses, key=losses.__getitem__)
    assert float(model.temperature) == pytest.approx(best["val"], rel=0.02)
    assert abs(best["val"] / best["test"] - 1) > 0.04
    assert model.is_calibrated
    assert model.describe_temperature().endswith("fitted on held-out images")
    assert result["test/ece"] != result["test/ece_calibrated"]


@pytest.mark.parametrize("options", [{}, {"val_fraction": 0.3}, {"val_fraction": 0.2, "seed": 1}])
def test_without_the_images_held_out_from_its_own_training_a_decision_has_no_temperature(options, path):
    model = Classifier.load_from_checkpoint(path, logit_adjustment=1.0)
    new_trainer(FitTemperature()).test(model, images(**options), verbose=False)
    assert not model.is_calibrated
    assert model.describe_temperature() == "no temperature fitted for this decision: see val_fraction"


def test_the_temperature_of_the_training_stays_that_of_its_decision(path):
    model = Classifier.load_from_checkpoint(path)
    fitted = float(model.temperature)
    assert fitted != 1
    new_trainer(FitTemperature()).test(model, images(val_fraction=0.2), verbose=False)
    assert float(model.temperature) == fitted
