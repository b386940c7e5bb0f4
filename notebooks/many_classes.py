"""Measures accuracy and time of learnt and fixed class vectors for 1,000 and 10,000 classes, for docs/when_to_fix.md.

Each class is one real picture: the first K training images of Fashion-MNIST. A view of it is shifted, darker or lighter, of other contrast,
and noisy; every view in training is another, and the test asks which picture one more view shows. The network is a perceptron with 512
features. What has been measured is not measured again:

    python -m notebooks.many_classes --classes 1000 --epochs 300
    python -m notebooks.many_classes --classes 10000 --epochs 100
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflight import CosineHead, DotRegressionLoss, ETFHead
from etflight.data import FashionMNIST

RESULTS = Path("notebooks/evaluations/many_classes.json")
WIDTH, BATCH = 512, 256
# the best of 0.1, 0.3, 1, 3 (and 10 for the last) on 1,000 classes, 30 epochs, seed 3
RATES = {"learnt": 0.3, "fixed": 0.3, "fixed_dr": 3.0}


def pictures(count: int) -> Tensor:
    """The classes, uint8 `[K, 28, 28]`."""
    return FashionMNIST().split("train").source.images(torch.arange(count)).squeeze(1)


def views(images: Tensor, generator: torch.Generator) -> Tensor:
    """One view of each, float32 `[B, 784]`: shifted by up to 2 pixels, contrast and brightness changed by up to a fifth, noise of 0.1."""
    padded = F.pad(images.float() / 255, (2, 2, 2, 2))
    rows, columns = torch.randint(5, (2, len(images), 1), generator=generator) + torch.arange(28)
    shifted = padded[torch.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]
    contrast, brightness = 1 + 0.4 * (torch.rand(2, len(images), 1, 1, generator=generator) - 0.5)
    noise = 0.1 * torch.randn(shifted.shape, generator=generator)
    return ((shifted - 0.5) * contrast + 0.5 * brightness + noise).flatten(1) - 0.5


def network(kind: str, classes: int) -> tuple[nn.Sequential, CosineHead | ETFHead]:
    """The perceptron, and the class vectors behind it."""
    layers: list[nn.Module] = []
    for before, after in ((784, 1024), (1024, 1024)):
        layers += [nn.Linear(before, after, bias=False), nn.BatchNorm1d(after), nn.ReLU()]
    features = nn.Sequential(*layers, nn.Linear(1024, WIDTH))
    if kind == "learnt":
        return features, CosineHead(WIDTH, classes, scale=16.0, batch_norm=True)
    code = "simplex" if classes <= WIDTH + 1 else "sphere"
    return features, ETFHead(WIDTH, classes, code=code, scale=1.0 if kind == "fixed_dr" else 16.0)


def train(kind: str, classes: int, epochs: int, seed: int, rate: float) -> dict[str, Any]:
    """Train, and test on one view of each class."""
    torch.manual_seed(seed)
    images = pictures(classes)
    draw = torch.Generator().manual_seed(seed)
    features, head = network(kind, classes)
    trained = [p for p in (*features.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-4)
    steps = epochs * (classes // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    dot_regression = DotRegressionLoss()
    start = time.process_time()
    for _ in range(epochs):
        for batch in torch.randperm(classes, generator=draw)[: classes // BATCH * BATCH].split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                z = features(views(images[batch], draw))
            if kind == "fixed_dr":
                cosines = (head.embed(z) * head.weight[batch]).sum(1)
                loss = dot_regression.from_target_logits(cosines, batch, classes)
            else:
                loss = F.cross_entropy(head(z), batch)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
            schedule.step()
    seconds = (time.process_time() - start) / steps
    features.eval(), head.eval()
    draw.manual_seed(1_000_000)
    found, similar = 0, 0.0
    with torch.inference_mode():
        for batch in torch.arange(classes).split(1000):
            embedding = head.embed(features(views(images[batch], draw)))
            cosines = embedding @ F.normalize(head.weight, dim=1).T
            found += int((cosines.argmax(1) == batch).sum())
            similar += float(cosines[torch.arange(len(batch)), batch].sum())
    return {
        "classes": classes,
        "kind": kind,
        "epochs": epochs,
        "seed": seed,
        "rate": rate,
        "accuracy": round(100 * found / classes, 2),
        "cosine": round(similar / classes, 3),
        "ms_a_step": round(1000 * seconds, 1),
        "trained_numbers": sum(p.numel() for p in trained),
    }


def main() -> None:
    """Measure what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1_000, 10_000])
    parser.add_argument("--kinds", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--epochs", type=int, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rate", type=float, help=f"learning rate; by default {RATES}")
    arguments = parser.parse_args()
    records = json.loads(RESULTS.read_text()) if RESULTS.is_file() else []
    known = {(r["kind"], r["classes"], r["epochs"], r["seed"], r["rate"]) for r in records}
    for classes in arguments.classes:
        for kind in arguments.kinds:
            for seed in arguments.seeds:
                what = (kind, classes, arguments.epochs, seed, arguments.rate or RATES[kind])
                if what not in known:
                    records.append(train(*what))
                    print(records[-1], flush=True)
                    RESULTS.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
