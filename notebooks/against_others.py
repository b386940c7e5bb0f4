"""Measures what docs/others.md says of two other code bases, which stand beside this one, on one thread of the processor:

git clone https://github.com/rhubarbwu/neural-collapse && git -C neural-collapse checkout c3864c2
git clone https://github.com/NeuralCollapseApplications/ImbalancedLearning && git -C ImbalancedLearning checkout d319ff0
python -m notebooks.against_others measures --code neural-collapse
python -m notebooks.against_others loss --code ImbalancedLearning
python -m notebooks.against_others training --code ImbalancedLearning --precision 32-true
"""

import argparse
import importlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from etflight import DotRegressionLoss, simplex_etf
from etflight.cli.stages import main as etflight
from etflight.data import CIFAR10
from etflight.metrics import ClassStatistics, measures

BATCH = 128
STEPS, FIRST = 10, 2  # steps of an epoch that are timed, after the first
Sample = tuple[Tensor, Tensor, Tensor]  # features, labels, class vectors


def features(n: int, K: int, d: int, spread: float = 0.3, offset: float = 0.0) -> Sample:
    """Random classes with normal features around them, and class vectors near the class means."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(K, d, generator=generator)
    labels = torch.cat([torch.arange(K), torch.randint(K, (n - K,), generator=generator)])
    noise = spread * torch.randn(n, d, generator=generator)
    return centres[labels] + noise + offset, labels, centres + 0.1 * torch.randn(K, d, generator=generator)


def batches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(x.split(256), y.split(256), strict=True)


def their_measures(x: Tensor, y: Tensor, weight: Tensor) -> dict[str, float]:
    """NC1 to NC4 by neural_collapse, in float32 as by its default: a pass for the means, one for the rest."""
    accumulate = importlib.import_module("neural_collapse.accumulate")
    measure = importlib.import_module("neural_collapse.measure")
    K, d = weight.shape
    mean = accumulate.MeanAccumulator(K, d)
    for features, labels in batches(x, y):
        mean.accumulate(features, labels)
    means, middle = mean.compute()
    within = accumulate.CovarAccumulator(K, d, M=means)
    variances = accumulate.VarNormAccumulator(K, d, M=means)
    decisions = accumulate.DecAccumulator(K, d, M=means, W=weight)
    for features, labels in batches(x, y):
        within.accumulate(features, labels, means)
        variances.accumulate(features, labels, means)
        decisions.accumulate(features, labels, weight, means)
    tile = 100 if K > 100 else None  # all pairs at once would take K² d numbers
    return {
        # it divides the between-class matrix by d instead of K
        "nc1": measure.covariance_pinv(means, within.compute(), middle) * K / d,
        "cdnv": measure.variability_cdnv(means, variances.compute()[0], tile_size=tile),
        "nc2": measure.simplex_etf_error(means, middle),
        "nc3": measure.self_duality_error(means, weight, middle),
        "nc4": (decisions.totals.sum() / decisions.ns_samples.sum()).item(),
    }


def our_measures(x: Tensor, y: Tensor, weight: Tensor) -> dict[str, float]:
    """The same by etflight, in float64 as by its default: one pass, and one for NC4."""
    metric = ClassStatistics(*weight.shape)
    for features, labels in batches(x, y):
        metric.update(features, labels)
    stats = metric.compute()
    agree = sum(float(measures.nc4(part, stats, weight)) * len(part) for part in x.split(256)) / len(x)
    return {
        "nc1": float(measures.nc1(stats)),
        "cdnv": float(measures.cdnv(stats)),
        "nc2": float(measures.structure_error(stats, of="means")),
        "nc3": float(measures.structure_error(stats, weight, center_weight=False)),
        "nc4": agree,
    }


def nc1_by_its_formula(x: Tensor, y: Tensor) -> float:
    """tr(Σ_W Σ_B⁺)/K as it is written, in float64."""
    x = x.double()
    means = torch.stack([x[y == k].mean(0) for k in range(int(y.max()) + 1)])
    centred, deviations = means - means.mean(0), x - means[y]
    between = centred.T @ centred / len(means)
    within = deviations.T @ deviations / len(x)
    return float(torch.trace(within @ torch.linalg.pinv(between, hermitian=True))) / len(means)


def compare_measures() -> None:
    for n, K, d in ((50_000, 10, 64), (50_000, 100, 512), (20_000, 100, 2048), (50_000, 1000, 512)):
        sample = features(n, K, d)
        seconds: dict[Any, list[float]] = {their_measures: [], our_measures: []}
        values = {}
        for _ in range(3):
            for function, of_function in seconds.items():
                start = time.process_time()
                values[function] = function(*sample)
                of_function.append(time.process_time() - start)
        theirs, ours = (statistics.median(of_function) for of_function in seconds.values())
        differ = max(abs(value / values[our_measures][name] - 1) for name, value in values[their_measures].items())
        print(f"n {n}, K {K}, d {d}: theirs {theirs:.2f} s, ours {ours:.2f} s; values differ by {differ:.0e}")
    for spread, offset in ((1e-2, 0.0), (1e-4, 0.0), (1e-3, 100.0)):
        x, y, weight = features(20_000, 10, 64, spread, offset)
        exact = nc1_by_its_formula(x, y)
        errors = [abs(function(x, y, weight)["nc1"] / exact - 1) for function in (their_measures, our_measures)]
        print(f"NC1 {exact:.1e}, means near {offset:g}: relative error theirs {errors[0]:.0e}, ours {errors[1]:.0e}")


def compare_loss() -> None:
    """Dot regression balanced over a mixed batch, with its gradient."""
    methods = importlib.import_module("methods")
    torch.manual_seed(0)
    K, share = 10, 0.3
    vectors = simplex_etf(K, 64).float()
    labels = torch.multinomial(0.6 ** torch.arange(K).double(), BATCH, replacement=True)
    others = labels[torch.randperm(BATCH)]
    embedding = F.normalize(torch.randn(BATCH, 64))
    theirs, ours = (embedding.clone().requires_grad_() for _ in range(2))
    weighted = methods.produce_Ew(labels, K) * vectors.T
    terms = [methods.dot_loss(theirs, y, weighted, None, "reg_dot_loss", torch.ones(BATCH)) for y in (labels, others)]
    expected = share * terms[0] + (1 - share) * terms[1]
    mixed = share * F.one_hot(labels, K).float() + (1 - share) * F.one_hot(others, K).float()
    value = DotRegressionLoss(class_balance="batch")(ours @ vectors.T, mixed)
    expected.backward()
    value.backward()
    differ = (theirs.grad - ours.grad).abs().max()
    print(f"loss {expected.item():.7f}, ours {value.item():.7f}; gradients differ by {differ:.0e}")


class Pictures(Dataset[tuple[Tensor, int]]):
    """CIFAR-10 at ratio 100, a picture at a time through torchvision, as their `datasets/cifar10.py` reads it."""

    def __init__(self) -> None:
        split = CIFAR10(imbalance_ratio=100).split("train")
        self.pixels = split.source.images(split.indices).permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = split.labels.tolist()
        normalize = transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
        steps = [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Theirs:
    """Their network, head, mixup and balanced dot regression; a call is some steps of an epoch, and returns their seconds."""

    def __init__(self) -> None:
        networks, self.methods = importlib.import_module("models.resnet_cifar"), importlib.import_module("methods")
        self.network, self.head = networks.resnet32_fe(), networks.ETF_Classifier(64, 10)
        parameters = [*self.network.parameters(), *self.head.parameters()]
        self.optimizer = torch.optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=2e-4)
        self.loader = DataLoader(Pictures(), BATCH, shuffle=True, num_workers=2, persistent_workers=True)

    def __call__(self) -> tuple[float, float]:
        start = clock()
        for step, (images, labels) in enumerate(itertools.islice(self.loader, FIRST + STEPS)):
            if step == FIRST:
                start = clock()
            vectors = self.methods.produce_Ew(labels, 10) * self.head.ori_M
            mixed, *pair, share = self.methods.mixup_data(images, labels, use_cuda=False)
            embedding = self.head(self.network(mixed))
            norms = embedding.detach().norm(dim=1).clamp(min=1e-8)
            terms = [self.methods.dot_loss(embedding, y, vectors, None, "reg_dot_loss", norms) for y in pair]
            loss = share * terms[0] + (1 - share) * terms[1]
            loss.item()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return since(start)


class Alternate(Callback):
    """Runs their epoch before each of the trainer's own, and prints the images a second of both."""

    def __init__(self) -> None:
        self.other, self.theirs, self.ours = Theirs(), [], []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.theirs.append(self.other())

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == FIRST:
            self.start = clock()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.ours.append(since(self.start))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        for column, kind in enumerate(("second", "processor second")):
            rates = [
                statistics.median(STEPS * BATCH / s[column] for s in seconds[1:])
                for seconds in (self.theirs, self.ours)
            ]
            print(
                f"images for a {kind}: theirs {rates[0]:.0f}, ours {rates[1]:.0f}, {rates[1] / rates[0]:.2f} times as many"
            )


def clock() -> tuple[float, float]:
    """Seconds, and processor seconds with those of the loader's processes."""
    own, ticks = str(os.getpid()), 0
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if fields[1] == own:
            ticks += int(fields[11]) + int(fields[12])
    return time.perf_counter(), time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def since(start: tuple[float, float]) -> tuple[float, float]:
    now = clock()
    return now[0] - start[0], now[1] - start[1]


def compare_training(precision: str) -> None:
    """`etflight fit` and their loop, an epoch of each in turn, in a run folder that must be new."""
    etflight(
        [
            "fit", "-c", "data/cifar10_lt", "-c", "arms/etf_dr_balanced", "--trainer.precision", precision, "--trainer.max_epochs", "5",
            "--trainer.limit_train_batches", str(FIRST + STEPS), "--trainer.limit_val_batches", "0", "--trainer.accelerator", "cpu",
            "--trainer.enable_model_summary", "false", "--monitor", "null", "--name", f"against_others/{precision}",
            "--trainer.callbacks+=notebooks.against_others.Alternate",
        ]
    )  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=("measures", "loss", "training"))
    parser.add_argument("--code", required=True, help="the folder of the other code base")
    parser.add_argument("--precision", default="32-true")
    arguments = parser.parse_args()
    sys.path.append(arguments.code)
    torch.set_num_threads(1)
    np.random.seed(0)
    torch.Tensor.cuda = lambda tensor, *_: tensor  # their code asks for a GPU
    if arguments.part == "measures":
        compare_measures()
    elif arguments.part == "loss":
        compare_loss()
    else:
        compare_training(arguments.precision)
