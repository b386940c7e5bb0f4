"""A device without float64, such as Apple's: everything runs on it, with the numbers of a processor."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor

from etflight import Classifier, geometry
from etflight.callbacks import NearestClassMean, NeuralCollapseMonitor
from etflight.data import Digits
from etflight.data.transforms import TrainTransform
from etflight.metrics import ClassStatistics, measures, ood, retrieval
from tests import no_float64
from tests.training import new_trainer

pytestmark = pytest.mark.skipif(not no_float64.is_possible(), reason="this torch knows no device written in Python")


@pytest.fixture(scope="module")
def elsewhere():
    """Calls a function of this file in a process that has such a device."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=no_float64.install) as process:
        yield lambda function, *args: process.submit(function, f"{no_float64.NAME}:0", *args).result()


def train_and_test(device: str, folder: Path) -> dict[str, float]:
    place = {} if device == "cpu" else {"accelerator": "auto", "strategy": no_float64.strategy()}
    options = {"max_epochs": 1, "limit_train_batches": 2, "inference_mode": False, "default_root_dir": folder}
    trainer = partial(new_trainer, **options, **place)
    seed_everything(0, verbose=False)
    # so small a rate that the rounding of gradients, which batch normalisation enlarges, does not show
    model = Classifier(10, "resnet20_cifar", in_chans=1, optimizer=partial(torch.optim.SGD, lr=1e-3))
    data, training = Digits(imbalance_ratio=20, val_fraction=0.2), trainer(NeuralCollapseMonitor(snapshots=40))
    training.fit(model, data)
    results = {name: float(value) for name, value in training.callback_metrics.items()}
    nearest_mean = trainer(NearestClassMean()).test(model, data, verbose=False)[0]
    results |= {f"{name}_ncm": value for name, value in nearest_mean.items()}
    model.hparams["logit_adjustment"] = 1.0
    return results | dict(trainer().test(model, data, verbose=False)[0])


def test_training_and_testing_give_the_numbers_of_the_processor(elsewhere, tmp_path):
    found, expected = elsewhere(train_and_test, tmp_path), train_and_test("cpu", tmp_path)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-3, nan_ok=True)
    assert {"train/loss", "val/ece_calibrated", "nc/train/nc1", "nc/val/nc4", "test/acc", "test/acc_ncm"} <= set(found)


def measure(device: str) -> dict[str, Tensor]:
    """What every function that computes in float64 makes of tensors of a device."""
    random = torch.Generator().manual_seed(0)
    features, others = (torch.randn(60, 12, generator=random).to(device) for _ in range(2))
    weight, bias = torch.randn(6, 12, generator=random).to(device), torch.randn(6, generator=random).to(device)
    labels = torch.arange(60).remainder(6).to(device)
    statistics = ClassStatistics(6, 12).to(device)
    statistics.update(features, labels)
    moments, logits = statistics.compute(), features @ weight.T + bias
    subspace = ood.principal_subspace(features, 5)
    frame, score = geometry.nearest_etf(weight)
    known, unknown = ood.mahalanobis(features, moments), ood.mahalanobis(others, moments)
    results = {
        **measures.summary(moments, weight, bias),
        "nc4": measures.nc4(features, moments, weight, bias),
        "agreement": measures.agreement(logits.argmax(1), labels),
        "nc5": measures.nc5(moments, others[0]),
        "msp": ood.msp(logits),
        "max_logit": ood.max_logit(logits),
        "energy": ood.energy(logits),
        "mahalanobis": known,
        "knn": ood.knn(others, features, k=3),
        "neco": ood.neco_max_logit(others, logits, subspace),
        "span_norm": ood.span_norm(others, weight),
        "largest_cosine": ood.largest_cosine(others, weight),
        "nearest_etf": frame,
        "nearest_etf_score": score,
        "separation": torch.tensor([*ood.separation(known, unknown), *ood.separation(logits[:, 0], others[:, 0])]),
        "retrieval": torch.tensor([*retrieval.retrieval_scores(features, labels, others, labels)]),
    }
    return {name: values.cpu().double() for name, values in results.items()}


def test_measures_and_scores_are_those_of_the_processor(elsewhere):
    found, expected = elsewhere(measure), measure("cpu")
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5, equal_nan=True, msg=name)
    assert found.keys() == expected.keys()


def augment(device: str) -> tuple[Tensor, Tensor]:
    changes = {"crop_padding": 4, "flip": True, "color_jitter": 0.4, "cutout": 8, "random_erasing": 0.5, "mixup": 1.0}
    transform = TrainTransform(num_classes=4, mean=(0.5,), std=(0.25,), auto_augment="randaugment-n5-m9", **changes)
    images = torch.randint(256, (32, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images, labels = transform(images.to(device), torch.arange(32).remainder(4).to(device), step=0)
    return images.cpu(), labels.cpu()


def test_images_are_augmented(elsewhere):
    images, labels = elsewhere(augment)
    assert images.shape == (32, 3, 32, 32)
    assert images.dtype == torch.float32
    assert bool(images.isfinite().all())
    assert torch.equal(labels.sum(1), torch.ones(32))
