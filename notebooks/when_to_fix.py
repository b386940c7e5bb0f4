"""Measures what docs/when_to_fix.md reports of trained runs, and collects it in notebooks/evaluations/when_to_fix.json.

The runs come from the studies fashion_mnist_10k, unknown_classes, new_classes and digits_labels. What has been measured is not measured
again, and numbers of runs that are elsewhere stay:

    python -m notebooks.when_to_fix
"""

import json
import re
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RUNS = Path("runs")
RESULTS = Path("notebooks/evaluations/when_to_fix.json")

# for each set of runs the images that its models have never seen
HELD_OUT = "--data ClassSubset --data.images ArrayImages --data.images.path data/gtsrb32.npz --data.classes 33-42"
UNKNOWN = {
    "fashion_mnist_10k": {
        "Digits": "--data Digits --adapt true",
        "omniglot": "--data ArrayImages --data.path data/omniglot.npz",
    },
    "gtsrb_sessions": {"held_out": HELD_OUT},
    "cifar10_10k": {"gtsrb": "--data ArrayImages --data.path data/gtsrb32.npz"},
}
SEEDS = (0, 1, 2)  # not 3, with which options were chosen
WAYS = {"cifar10_sessions": 1, "digits_sessions": 1, "gtsrb_sessions": 2, "omniglot_sessions": 4}
SHOTS = 5
METHODS: dict[str, dict[str, list[object]]] = {
    # the default rate is that of the paper, 2.5
    "etf_dr_reserved": {"frame": ["frame"], "frame, --lr 0.25": ["frame", "--lr", 0.25], "ncm": ["ncm"]},
    # the best of 0.01, 0.03, 0.1 and 0.3 on digits_sessions, seed 3
    "etf_ce_reserved": {"frame": ["frame", "--lr", 0.03], "ncm": ["ncm"]},
    "ce_bn_norm": {"cosine": ["cosine"], "ncm": ["ncm"]},
}


def etflight(*words: object) -> None:
    """Run a command, and show it."""
    print("etflight", *words, flush=True)
    subprocess.run([sys.executable, "-m", "etflight", *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def runs_of(name: str) -> dict[str, list[Path]]:
    """The finished runs of a set by arm, in the order of `SEEDS`."""
    found = sorted(file.parent for seed in SEEDS for file in (RUNS / name).glob(f"*/seed{seed}/test_metrics.json"))
    return {arm: [run for run in found if run.parent.name == arm] for arm in sorted({run.parent.name for run in found})}


def summary(values: Iterable[float]) -> dict[str, Any]:
    """The values in percent, with mean and standard deviation (n - 1)."""
    percent = [100 * value for value in values]
    return {
        "values": [round(value, 2) for value in percent],
        "mean": round(statistics.mean(percent), 2),
        "std": round(statistics.stdev(percent), 2) if len(percent) > 1 else None,
    }


def unknown_classes() -> list[dict[str, Any]]:
    """AUROC and FPR95 of each score, for each pair of sets and arm."""
    rows = []
    for name, sets in UNKNOWN.items():
        for unknown, words in sets.items():
            for arm, runs in runs_of(name).items():
                records = []
                for run in runs:
                    folder = run / "unknown" / unknown
                    if not (folder / "ood.json").is_file():
                        etflight("ood", run, *words.split(), "--output", folder)
                    records.append(json.loads((folder / "ood.json").read_text()))
                for score in records[0]["scores"]:
                    of_runs = {
                        number: summary(record["scores"][score][number] for record in records)
                        for number in ("auroc", "fpr95")
                    }
                    rows.append({"known": name, "unknown": unknown, "arm": arm, "score": score, **of_runs})
                nc5 = [round(record["nc5"], 3) for record in records]
                rows.append({"known": name, "unknown": unknown, "arm": arm, "nc5": nc5})
    return rows


def new_classes() -> list[dict[str, Any]]:
    """Accuracies after the last session; the seed of a run also chooses its shots."""
    rows = []
    for name, way in WAYS.items():
        for arm, runs in runs_of(name).items():
            for method, words in METHODS.get(arm, {}).items():
                records = []
                for run in runs:
                    seed = run.name.removeprefix("seed")
                    folder = run / "sessions" / re.sub(r"\W+", "_", method)
                    if not (folder / "incremental.json").is_file():
                        options = ["--way", way, "--shots", SHOTS, "--seed", seed, "--method", *words]
                        etflight("incremental", run, *options, "--output", folder)
                    records.append(json.loads((folder / "incremental.json").read_text()))
                last = [record["sessions"][-1] for record in records]
                numbers = {
                    key: summary(session[key] for session in last)
                    for key in ("acc", "acc_base", "acc_new", "forgetting")
                }
                before = summary(record["sessions"][0]["acc"] for record in records)
                rows.append({"set": name, "arm": arm, "method": method, "acc_before": before, **numbers})
    return rows


def shared_space() -> list[dict[str, Any]]:
    """Retrieval within and across the runs of an arm, on classes of the training and on others."""
    rows = []
    for name, others in (
        ("fashion_mnist_10k", {"known": "", "omniglot": UNKNOWN["fashion_mnist_10k"]["omniglot"]}),
        ("cifar10_10k", {"known": ""}),
        ("gtsrb_sessions", {"held_out": HELD_OUT}),
    ):
        for arm, runs in runs_of(name).items():
            if len(runs) < len(SEEDS):
                continue
            for images, words in others.items():
                file = RUNS / name / arm / f"retrieval_{images}.json"
                if not file.is_file():
                    etflight("retrieval", *runs, *words.split(), "--output", file)
                record = json.loads(file.read_text())
                for mean in record["mean_of_all"]:
                    pairs = [pair for pair in record["pairs"] if pair["space"] == mean["space"]]
                    row: dict[str, Any] = {"set": name, "images": images, "arm": arm, "space": mean["space"]}
                    for key in ("recall_at_1", "mean_average_precision"):
                        row[key] = {
                            "within": summary(p[key] for p in pairs if p["query"] == p["gallery"]),
                            "across": summary(p[key] for p in pairs if p["query"] != p["gallery"]),
                            "mean_of_all": round(100 * mean[key], 2),
                        }
                    rows.append(row)
    return rows


def labels() -> list[dict[str, Any]]:
    """Test accuracies of trainings on few and on wrong labels, and on all of them."""
    rows = []
    for folder in sorted([*RUNS.glob("digits_*"), RUNS / "fashion_mnist_10k", RUNS / "cifar10_10k"]):
        if folder.name == "digits_sessions":
            continue
        for arm, runs in runs_of(folder.name).items():
            records = [json.loads((run / "test_metrics.json").read_text()) for run in runs]
            numbers = {key: summary(record[f"test/{key}"] for record in records) for key in ("acc", "ece_calibrated")}
            rows.append({"set": folder.name, "arm": arm, **numbers})
    return rows


def _identity(row: dict[str, Any]) -> str:
    return " ".join(value for value in row.values() if isinstance(value, str))


if __name__ == "__main__":
    measured = {
        "labels": labels(),
        "unknown_classes": unknown_classes(),
        "new_classes": new_classes(),
        "shared_space": shared_space(),
    }
    # rows whose runs are no longer in this folder stay
    rows = json.loads(RESULTS.read_text())
    for part, own in measured.items():
        new = {_identity(row): row for row in own}
        rows[part] = sorted({**{_identity(row): row for row in rows[part]}, **new}.values(), key=_identity)
    RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
