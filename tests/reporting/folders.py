"""Run folders as a training and a test leave them, with numbers of the test's choice."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from etflight.reporting.groups import group
from etflight.reporting.page import write_page
from etflight.reporting.results import read_results

COUNTS = [128, 40, 8]
K, D, N = 5, 7, 3  # classes, features, embeddings a class of what a monitor leaves
EVIL = "</script><img src=x onerror=pwned=1><b>&\"'`${pwned=1}"


def make_run(folder: Path, *, acc: float = 0.5, arm: str = "ce", seed: Any = 0, **facts: Any) -> Path:
    """A run of three epochs on three classes; `facts` replace those of `run.json`."""
    folder.mkdir(parents=True)
    data = {"class": "Digits", "fingerprint": "5db3039069e4", "class_counts": COUNTS, "imbalance_ratio": 16.0}
    record = {
        "name": folder.name, "arm": arm,
        "command": f"etflight fit -c configs/data/digits.yaml -c configs/arms/{arm}.yaml --seed_everything {seed}",
        "config_sha256": "c" * 64, "commit": "a" * 40, "seed": seed,
        "hardware": {"cpu": "Abacus", "threads": 1, "gpus": [], "device": "cpu", "processes": 1},
        "model": {"params": 272_000, "multiply_adds": None},
        "data": data | {"validation": "the test set, watched only"},
    }  # fmt: skip
    write_json(folder / "run.json", record | facts)
    shots = {"test/acc_macro": acc, "test/acc_many": 1.0, "test/acc_medium": 0.25, "test/acc_few": acc / 2}
    write_json(
        folder / "test_metrics.json",
        {"test/acc": acc, "test/ece": 0.125, "test/ece_calibrated": 0.0625, "test/loss": 2.5, **shots},
    )
    rows = [{"step": 0, "epoch": 0.0, "nc/train/nc1": 2.0, "nc/train/alignment": 0.0}]
    for epoch, val in enumerate((0.25, 0.75, acc)):
        rows.append({"step": 14 * epoch + 13, "epoch": float(epoch), "train/loss": 3.0 - epoch})
        rows.append({"step": 14 * epoch + 13, "epoch": float(epoch), "val/acc": val, "nc/train/nc1": 1 / (1 + epoch),
                     "nc/train/alignment": epoch / 2.5})  # fmt: skip
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "speed.csv", [{"epoch": e, "step": e, "speed/epoch_s": 2.0 + e} for e in range(3)])
    return folder


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)


def make_runs(parent: Path) -> list[Path]:
    """Two seeds of two arms, with everything that a page shows."""
    folders = []
    for arm in ("ce", "etf"):
        for seed in (0, 1):
            run = make_run(parent / f"{arm}_{seed}", arm=arm, seed=seed, acc=0.5 + seed / 8)
            leave(run, seed=seed)
            write_csv(run / "per_class.csv", classes("abc"))
            (run / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{head: {arm}, lr: 0.1}}\n")
            folders.append(run)
    return folders


def classes(names):
    rows = zip(names, COUNTS, (1.0, 0.25, 0.5), strict=True)
    return [{"class": k, "name": name, "train_images": n, "acc": acc} for k, (name, n, acc) in enumerate(rows)]


def leave(folder, epochs=(0, 1, 2), classes=K, snapshots=True, seed=0):
    """Gram matrices and snapshots as the monitor leaves them, and what they were made of."""
    random = np.random.default_rng(seed)
    made = {}
    for name in ("gram", "snapshots"):
        (folder / name).mkdir(parents=True)
    labels = np.tile(np.arange(classes), N)
    for epoch in epochs:
        M, W = random.normal(size=(2, classes, D)) + 1
        H = (M[labels] + random.normal(size=(len(labels), D))).astype(np.float16)
        rows = np.concatenate([M, W, M.mean(0, keepdims=True)])
        gram = (rows @ rows.T).astype(np.float32)
        np.savez_compressed(folder / f"gram/epoch_{epoch:03d}.npz", classes=np.arange(classes), gram=gram, epoch=epoch)
        if snapshots:
            np.savez_compressed(
                folder / f"snapshots/epoch_{epoch:03d}.npz", embeddings=H, labels=labels, indices=np.arange(len(labels)),
                epoch=epoch, weight=W.astype(np.float32),
            )  # fmt: skip
        made[epoch] = M, W, H.astype(float), labels
    return made


def write(path, folders):
    """The page of these runs; returns what it leaves out."""
    results, problems = read_results(folders)
    assert problems == []
    return write_page(path, group(results)[0])


def cosines(A, B):
    return 1 - cdist(A, B, "cosine")
