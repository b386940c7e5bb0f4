"""Keeps the curves of finished 200-epoch runs in notebooks/curves/SET.json, and draws them.

    python -m notebooks.protocol_curves cifar10_lt runs/cifar10_lt_protocol/*/seed*

Runs that are no longer there keep what the file has of them. Head and tail are three tenths of the classes each.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

LOGGED = ["nc/train/nc1", "nc/train/alignment", "nc/train/nc4", "nc/val/nc1", "nc/val/alignment"] + [
    f"val/acc_{group}" for group in ("head", "middle", "tail")
]


def curves(run: Path) -> dict[str, Any]:
    """The logged numbers and the mean pairwise cosines within head and tail, after so many epochs."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["nc/train/nc1"]]
    found: dict[str, Any] = {"epoch": [int(float(row["epoch"])) + (row["step"] != "0") for row in rows]}
    for name in LOGGED:
        found[name] = [round(float(row[name]), 4) if row.get(name) else None for row in rows]
    grams = [np.load(run / "gram" / f"epoch_{epoch:03}.npz")["gram"] for epoch in found["epoch"]]
    K = len(grams[0]) // 2  # the largest class is the first
    for group, classes in (("head", slice(3 * K // 10)), ("tail", slice(7 * K // 10, K))):
        for name, gram_of in (("means", centred_means), ("vectors", vectors)):
            found[f"cos_{name}_{group}"] = [round(mean_cosine(gram_of(gram)[classes, classes]), 4) for gram in grams]
    return found


def centred_means(gram: np.ndarray) -> np.ndarray:
    """Inner products of the class means less the mean of all images, which is the last row."""
    K = len(gram) // 2
    return gram[:K, :K] - gram[:K, [-1]] - gram[[-1], :K] + gram[-1, -1]


def vectors(gram: np.ndarray) -> np.ndarray:
    """Inner products of the class vectors."""
    K = len(gram) // 2
    return gram[K : 2 * K, K : 2 * K]


def mean_cosine(gram: np.ndarray) -> float:
    """The mean cosine between different vectors with this Gram matrix."""
    norms = np.sqrt(np.diag(gram))
    cosines = gram / np.outer(norms, norms)
    return float(cosines[np.triu_indices(len(gram), 1)].mean())


def figure(known: dict[str, dict[str, Any]], num_classes: int) -> Figure:
    """NC1, alignment and the angles between the rarest classes, over the epochs: a colour for each arm, a line for each seed."""
    shown = [
        ("nc/train/nc1", "NC1, training images"),
        ("nc/train/alignment", "alignment, training images"),
        ("cos_means_tail", f"cosine between the means of the {3 * num_classes // 10} rarest classes"),
        ("cos_vectors_tail", "cosine between their class vectors"),
    ]
    arms = sorted({run.partition(", ")[0] for run in known})
    colour = dict(zip(arms, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    drawn, axes = plt.subplots(2, 2, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, (key, title) in zip(axes.flat, shown, strict=True):
        for run, values in sorted(known.items()):
            arm = run.partition(", ")[0]
            label = None if arm in axis.get_legend_handles_labels()[1] else arm
            axis.plot(
                values["epoch"], values[key], label=label, color=colour[arm], marker=".", markersize=3, linewidth=1
            )
        axis.set_title(title, fontsize=10)
        axis.axvspan(160, 200, color="0.93", zorder=0)
        if key == "nc/train/nc1":
            axis.set_yscale("log")
        if key.startswith("cos_"):
            axis.axhline(-1 / (num_classes - 1), color="0.5", linestyle=":", linewidth=1)
    for axis in axes[1]:
        axis.set_xlabel("epoch")
    axes[0, 0].legend(fontsize=8)
    return drawn


def main(name: str, runs: list[Path]) -> None:
    file = Path(f"notebooks/curves/{name}.json")
    known: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for run in runs:
        known[f"{run.parent.name}, {run.name}"] = curves(run)
    file.write_text(json.dumps(known) + "\n")
    records = json.loads(Path(f"notebooks/results/{name}.json").read_text())
    figure(known, records[0]["num_classes"]).savefig(f"notebooks/figures/{name}_curves.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1], list(map(Path, sys.argv[2:])))
