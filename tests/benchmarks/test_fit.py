"""`etflight fit` against training loops written by hand: one with the same tricks, one the usual way; and a whole training on a GPU."""

import statistics
import time

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from etflight import DotRegressionLoss, ETFHead
from etflight.backbones import build_backbone
from etflight.cli.stages import main
from etflight.data.transforms import TrainTransform
from tests.training import read_csv, save_arrays

pytestmark = pytest.mark.benchmark

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH, IMAGES = 128, 1280


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_arrays("images.npz", train=IMAGES, test=128, shape=(32, 32, 3))
    with np.load("images.npz") as arrays:
        return arrays["train_images"], torch.from_numpy(arrays["train_labels"])


@pytest.fixture
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def network():
    backbone, width = build_backbone("resnet32_cifar")
    return backbone, ETFHead(width, 10), DotRegressionLoss()


def sgd(parts, **options):
    parameters = [p for part in parts for p in part.parameters()]
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4, **options)


class Bare:
    """The same tricks, nothing else: one epoch a call."""

    def __init__(self, pixels, labels):
        self.pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
        self.labels = labels
        self.parts = network()
        self.parts[0].to(memory_format=torch.channels_last)
        self.optimizer = sgd(self.parts, fused=True)
        self.augment = TrainTransform(num_classes=10, mean=MEAN, std=STD, crop_padding=4, flip=True)

    def __call__(self):
        backbone, head, loss = self.parts
        for step, chosen in enumerate(torch.randperm(IMAGES).split(BATCH)):
            x, y = self.augment(self.pixels[chosen], self.labels[chosen], step)
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(head(backbone(x.contiguous(memory_format=torch.channels_last))), y)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()


class Pictures(Dataset):
    """One picture at a time, as in most training scripts."""

    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels
        crop, flip = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Usual:
    """NCHW, float32, a loader of single pictures with two workers, the loss read at each step: one epoch a call."""

    def __init__(self, pixels, labels):
        self.loader = DataLoader(
            Pictures(pixels, labels), batch_size=BATCH, shuffle=True, num_workers=2, persistent_workers=True
        )
        self.parts = network()
        self.optimizer = sgd(self.parts)

    def __call__(self):
        backbone, head, loss = self.parts
        total = 0.0
        for x, y in self.loader:
            value = loss(head(backbone(x)), y)
            self.optimizer.zero_grad()
            value.backward()
            self.optimizer.step()
            total += value.item()


class Alternate(Callback):
    """Runs an epoch of another loop before each of the trainer's own, and keeps the seconds of both."""

    other = None
    clock = time.perf_counter

    def __init__(self):
        self.theirs, self.ours = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        start = self.clock()
        type(self).other()
        self.started = self.clock()
        self.theirs.append(self.started - start)

    def on_train_epoch_end(self, trainer, pl_module):
        self.ours.append(self.clock() - self.started)

    def on_train_end(self, trainer, pl_module):
        type(self).ratio = statistics.median(a / b for a, b in zip(self.ours[1:], self.theirs[1:], strict=True))


def fit(*more):
    """Without the monitor, which has rows of its own."""
    main(
        [
            "fit", "--data", "ArrayImages", "--data.path", "images.npz", "--data.batch_size", str(BATCH), "--data.crop_padding", "4",
            "--data.flip", "true", "--model.backbone", "resnet32_cifar", "--trainer.precision", "bf16-mixed",
            "--trainer.limit_val_batches", "0", "--trainer.enable_model_summary", "false", "--monitor", "null", "--name", "r", *more,
        ]
    )  # fmt: skip


def seconds_of_fit_over(loop, clock, repeats):
    Alternate.other, Alternate.clock = staticmethod(loop), staticmethod(clock)
    fit(
        "--trainer.accelerator", "cpu", "--trainer.max_epochs", str(repeats + 1),
        f"--trainer.callbacks+={Alternate.__module__}.Alternate",
    )  # fmt: skip
    return Alternate.ratio


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("_two_threads")
def test_fit_keeps_up_with_a_bare_loop(images, record_ratio):
    # processor seconds: both compute all the time, and another load on the machine does not count
    ratio = seconds_of_fit_over(Bare(*images), time.process_time, repeats=5)
    record_ratio("etflight fit --monitor null / bare loop with the same tricks, ResNet-32, bf16", ratio, 1 / 0.97)


@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("_two_threads")
@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no bfloat16 of its own")
def test_fit_is_twice_as_fast_as_the_usual_loop(images, record_ratio):
    ratio = seconds_of_fit_over(Usual(*images), time.perf_counter, repeats=3)
    record_ratio("etflight fit --monitor null / the usual loop (NCHW, float32, single pictures), ResNet-32", ratio, 0.5)


@pytest.mark.timeout(1200)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("compile", "limit"), [("false", 120), ("reduce-overhead", 75)])
def test_a_whole_training_takes_no_longer_than_two_minutes_on_an_h100(
    compile, limit, tmp_path, monkeypatch, record_ratio
):
    """200 epochs at CIFAR-10-LT's shape and counts, validation on 10,000 images and the monitor's sweep in every epoch."""
    if "H100" not in torch.cuda.get_device_name():
        pytest.skip("the limit is for an H100")
    monkeypatch.chdir(tmp_path)
    save_arrays("images.npz", train=50_000, test=10_000, shape=(32, 32, 3))
    start = time.perf_counter()
    fit(
        "--data.imbalance_ratio", "100", "--trainer.limit_val_batches", "1.0", "--trainer.accelerator", "gpu", "--trainer.devices", "1",
        "--trainer.max_epochs", "200", "--model.compile", compile,
        "--trainer.callbacks+=etflight.callbacks.NeuralCollapseMonitor",
    )  # fmt: skip
    seconds = time.perf_counter() - start
    assert sum(bool(row.get("nc/train/nc1")) for row in read_csv(tmp_path / "runs/r/metrics.csv")) >= 200
    record_ratio(f"200 epochs of CIFAR-10-LT on an H100, compile {compile} / {limit} s", seconds / limit, 1.0)
