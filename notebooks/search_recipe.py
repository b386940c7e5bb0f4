"""Searches the strong recipe of CIFAR-10-LT for the best arm with a fixed frame, on held-out training images.

Each stage trains its candidates on 90 % of the training images and measures them on the other tenth (500 images a class); the longer
second stage has what the first one suggested. The test images are not touched. What has been tried is in
notebooks/evaluations/search_recipe.json, and is not tried again; a stopped run goes on:

    OMP_NUM_THREADS=1 python -m notebooks.search_recipe --jobs 2
"""

import csv
import json
import re
import subprocess
import sys
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from lightning.pytorch import Trainer

from etflight import Classifier
from etflight.data import CIFAR10

LOG = Path("notebooks/evaluations/search_recipe.json")
RUNS = Path("cifar10_lt_search")
SEED = 0
TAUS = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
SHOWN = ["val/acc", "val/acc_head", "val/acc_middle", "val/acc_tail", "val/ece", "nc/train/alignment", "nc/train/nc1"]


@dataclass(frozen=True)
class Candidate:
    """An arm and what changes it.

    Attributes:
        arm: The name of the arm.
        options: Further options.
        passes: Forward and backward passes of a step; it gets so many times fewer epochs.
        batch_size: Images of a step.
        weight_decay: The weight decay.
        first: The candidate whose run it goes on from, as the arm itself says; such an arm is trained without the recipe.
    """

    arm: str
    options: tuple[str, ...] = ()
    passes: int = 1
    batch_size: int = 128
    weight_decay: str = "5e-4"
    first: str | None = None


SQRT = ("--data.sampler", "sqrt", "--model.loss.tau", "0.5")
LEARNT_COSINES = ("--model.loss", "LogitAdjustedLoss")  # with BatchNorm and normalisation, as the frame has them
AFTERWARDS = ("--model.logit_adjustment", "1")
FIRST = {
    "balanced_softmax": Candidate("balanced_softmax"),
    "balanced_softmax, half by sampling": Candidate("balanced_softmax", SQRT),
    "etf_ce_la, scale 16": Candidate("etf_ce_la"),
    "etf_ce_la, scale 8": Candidate("etf_ce_la", ("--model.head.scale", "8")),
    "etf_ce_la, scale 30": Candidate("etf_ce_la", ("--model.head.scale", "30")),
    "etf_ce_la, learnt scale": Candidate("etf_ce_la", ("--model.head.learn_scale", "true")),
    "etf_ce_la, half by sampling": Candidate("etf_ce_la", SQRT),
    "etf_ce_la, half by sampling, scale 8": Candidate("etf_ce_la", (*SQRT, "--model.head.scale", "8")),
    "etf_ce_la, half by sampling, scale 5": Candidate("etf_ce_la", (*SQRT, "--model.head.scale", "5")),
    "learnt cosines, half by sampling, scale 8": Candidate(
        "ce_bn_norm", (*LEARNT_COSINES, *SQRT, "--model.head.scale", "8")
    ),
    "etf_ce_la, half by sampling, learnt scale": Candidate("etf_ce_la", (*SQRT, "--model.head.learn_scale", "true")),
    "etf_ce_la, projection to 256": Candidate("etf_ce_la", ("--model.head.projection_dim", "256")),
    "etf_bce": Candidate("etf_bce"),
    "etf_nonl": Candidate("etf_nonl"),
    "rbl": Candidate("rbl"),
    "etf_ce_la_sam": Candidate("etf_ce_la_sam", passes=2),
    "ce, adjusted afterwards": Candidate("ce", AFTERWARDS),
    "etf_ce, adjusted afterwards": Candidate("etf_ce", AFTERWARDS),
    "etf_mislas": Candidate("etf_mislas", first="etf_ce, adjusted afterwards"),
}
LATER = {
    "etf_ce_la, scale 8, batches of 64": Candidate("etf_ce_la", ("--model.head.scale", "8"), batch_size=64),
} | {
    f"{name}, weight decay {decay}": replace(FIRST[name], weight_decay=decay)
    for name in ("balanced_softmax, half by sampling", "etf_ce_la, half by sampling, scale 8")
    for decay in ("1e-3", "2e-3")
}
CANDIDATES = FIRST | LATER
STAGES = {
    30: list(FIRST),
    80: [
        "balanced_softmax",
        "balanced_softmax, half by sampling",
        "etf_ce_la, scale 8",
        "etf_ce_la, scale 8, batches of 64",
        "etf_ce_la, half by sampling, scale 8",
        "learnt cosines, half by sampling, scale 8",
        "etf_ce_la, half by sampling, scale 8, weight decay 1e-3",
        "balanced_softmax, half by sampling, weight decay 1e-3",
        "etf_ce_la, half by sampling, scale 8, weight decay 2e-3",
    ],
}


def folder(name: str, epochs: int) -> Path:
    """The run folder of a candidate, under `runs`."""
    return RUNS / f"epochs{epochs}" / re.sub(r"\W+", "_", name)


def command(name: str, epochs: int) -> list[str]:
    """The arguments of `etflight` that train a candidate in the stage of so many epochs."""
    candidate = CANDIDATES[name]
    recipe = ["protocols/strong"] if candidate.first is None else []
    files = ["data/cifar10_lt", "trainer/every_tenth", f"arms/{candidate.arm}", *recipe]
    if candidate.first is None:
        length = ["--model.optimizer.weight_decay", candidate.weight_decay]
        length += ["--trainer.max_epochs", str(epochs // candidate.passes)]
        if candidate.batch_size != 128:
            length += ["--data.batch_size", str(candidate.batch_size)]
    else:
        length = ["--fine_tuning.checkpoint", f"runs/{folder(candidate.first, epochs)}/checkpoints/last.ckpt"]
    return [
        "fit",
        *(word for file in files for word in ("-c", f"configs/{file}.yaml")),
        *candidate.options,
        *length,
        *("--data.val_fraction", "0.1"),
        *("--trainer.check_val_every_n_epoch", "5"),
        *("--monitor.every_n_epochs", "5"),
        *("--seed_everything", str(SEED)),
        *("--name", str(folder(name, epochs))),
        *("--ckpt_path", "last"),
    ]


def train(name: str, epochs: int) -> dict[str, Any]:
    """Train a candidate, or go on with it, and return what the log keeps."""
    print(name, epochs, flush=True)
    run = "runs" / folder(name, epochs)
    run.mkdir(parents=True, exist_ok=True)
    with (run / "search.log").open("a") as output:
        words = [sys.executable, "-m", "etflight", *command(name, epochs)]
        subprocess.run(words, check=True, stdout=output, stderr=subprocess.STDOUT)
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {key: next(float(row[key]) for row in reversed(rows) if row.get(key)) for key in SHOWN}
    record = json.loads((run / "run.json").read_text())
    return {
        "candidate": name,
        "epochs": epochs,
        **{key: round(value, 4) for key, value in last.items()},
        **{key: record[key] for key in ("seed", "command", "commit")},
        "hardware": record["hardware"]["cpu"],
    }


class HeldOut(CIFAR10):
    """CIFAR-10-LT whose held-out images are the ones to predict."""

    predict_dataloader = CIFAR10.val_dataloader


def adjusted(run: Path) -> dict[str, list[float]]:
    """Accuracies of a finished run on the held-out images, all, head, middle and tail, for each τ of a logit adjustment after training."""
    data = HeldOut(imbalance_ratio=100, val_fraction=0.1)
    trainer = Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    model = Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt", logit_adjustment=0)
    model.temperature.fill_(1)
    predicted: list[Any] = trainer.predict(model, data) or []
    scores = torch.cat(predicted).double().log()
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    prior = torch.from_numpy(data.class_counts / data.class_counts.sum())
    found = {}
    for tau in TAUS:
        right = (scores - tau * prior.log()).argmax(dim=1) == labels
        classes = torch.stack([right[labels == label].double().mean() for label in range(len(prior))])
        groups = (classes, classes[:3], classes[3:7], classes[7:])
        found[f"{tau:g}"] = [round(float(group.mean()), 4) for group in groups]
    return found


def main() -> None:
    """Run what has not been run yet, and keep the log after each run."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, on one thread each")
    jobs = parser.parse_args().jobs
    log: list[dict[str, Any]] = json.loads(LOG.read_text()) if LOG.is_file() else []
    lock = Lock()

    def run(name: str, epochs: int) -> None:
        entry = train(name, epochs)
        with lock:
            log.append(entry)
            LOG.write_text(json.dumps(log, indent=2) + "\n")

    for epochs, names in STAGES.items():
        for later in (False, True):  # those that go on from another come after it
            done = {entry["candidate"] for entry in log if entry["epochs"] == epochs}
            due = [n for n in names if n not in done and (CANDIDATES[n].first is not None) == later]
            with ThreadPoolExecutor(jobs) as pool:
                list(pool.map(run, due, [epochs] * len(due)))
    for entry in log:
        run_folder = "runs" / folder(entry["candidate"], entry["epochs"])
        if entry["epochs"] == max(STAGES) and "adjusted" not in entry and run_folder.is_dir():
            entry["adjusted"] = adjusted(run_folder)
            LOG.write_text(json.dumps(log, indent=2) + "\n")


if __name__ == "__main__":
    main()
