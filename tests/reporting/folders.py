"""Run folders as a training and a test leave them, with numbers of the test's choice."""

import csv
import json
from pathlib import Path
from typing import Any

COUNTS = [128, 40, 8]


def make_run(folder: Path, *, acc: float = 0.5, arm: str = "ce", seed: Any = 0, **facts: Any) -> Path:
    """A run of three epochs on three classes; `facts` replace those of `run.json`."""
    folder.mkdir(parents=True)
    data = {"class": "Digits", "fingerprint": "5db3039069e4", "class_counts": COUNTS, "imbalance_ratio": 16.0}
    record = {
        "name": folder.name, "arm": arm,
        "command": f"etflight fit -c configs/data/digits.yaml -c configs/arms/{arm}.yaml --seed_everything {seed}",
        "config_sha256": "c" * 64, "commit": "a" * 40, "seed": seed,
        "hardware": {"cpu": "Abacus", "threads": 1, "gpus": [], "device": "cpu", "processes": 1},
        "data": data | {"validation": "the test set, watched only"},
    }  # fmt: skip
    write_json(folder / "run.json", record | facts)
    shots = {"test/acc_macro": acc, "test/acc_many": 1.0, "test/acc_medium": 0.25, "test/acc_few": acc / 2}
    write_json(folder / "test_metrics.json", {"test/acc": acc, "test/ece": 0.125, "test/loss": 2.5, **shots})
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
