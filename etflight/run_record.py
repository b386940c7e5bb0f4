"""What it takes to repeat a run: the record `run.json` of its folder."""

import hashlib
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from etflight.run_folder import read_record

PACKAGES = ("etflight", "torch", "lightning", "torchmetrics", "torchvision", "timm", "numpy")


def facts(*, name: str, arm: str | None, config: Mapping[str, Any], trainer: Trainer) -> dict[str, Any]:
    """What it takes to repeat a run, whatever it does: command, configuration, commit, versions, hardware.

    Args:
        name: of the run.
        arm: that its configuration files stand for, or None.
        config: all arguments as plain data.
        trainer: about to run.
    """
    return {
        "name": name,
        "arm": arm,
        "command": shlex.join(["etflight", *sys.argv[1:]]),
        "config_sha256": config_sha256(config),
        "commit": _commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}},
        "hardware": {
            "cpu": _processor(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "device": trainer.strategy.root_device.type,
            "processes": trainer.world_size,
        },
    }


def training_facts(*, seed: Any, data: object) -> dict[str, Any]:
    """What it takes to repeat a training beside `facts`: the seed, and which images were chosen."""
    counts = [int(n) for n in getattr(data, "class_counts", [])]
    return {
        "seed": seed,
        "data": {
            "class": type(data).__name__,
            "dataset": getattr(data, "dataset_name", type(data).__name__),
            "fingerprint": getattr(data, "fingerprint", None),
            "class_counts": counts,
            "imbalance_ratio": _imbalance_ratio(data, counts),
            "validation": "held out" if getattr(data, "val_is_held_out", False) else "the test set, watched only",
        },
    }


def facts_of_training(folder: Path) -> dict[str, Any]:
    """`training_facts` that a training has left in its run folder, as far as they can be read."""
    record = read_record(folder)
    return {name: record[name] for name in ("seed", "data") if name in record}


def resumed_facts(folder: Path, now: Mapping[str, Any]) -> dict[str, Any]:
    """What changes in a record when its run goes on: nothing of how it began, and one more entry in `resumed`.

    Args:
        folder: the run folder, with the record so far.
        now: `facts` of the process that goes on.
    """
    record, start = read_record(folder), ("command", "commit", "started")
    again = {name: now[name] for name in start}
    return {**{name: record.get(name, now[name]) for name in start}, "resumed": [*record.get("resumed", []), again]}


def config_sha256(config: Mapping[str, Any]) -> str:
    """The hash of a configuration without what tells the runs of an arm apart: seed, name, place, loggers, first stage.

    Args:
        config: all arguments as plain data.

    Returns:
        64 hexadecimal digits, the same for every seed of an arm.
    """
    outer = {"seed_everything", "name", "ckpt_path", "weights_only"}
    content = {key: value for key, value in config.items() if key not in outer}
    trainer = {key: value for key, value in config["trainer"].items() if key not in ("default_root_dir", "logger")}
    tuning = content.get("fine_tuning")
    if tuning:
        content["fine_tuning"] = {**tuning, "checkpoint": None}
    text = json.dumps({**content, "trainer": trainer}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _imbalance_ratio(data: object, counts: Sequence[int]) -> float | None:
    """The one asked for, which truncated counts only come near; else that of the images as they are."""
    asked = float(getattr(data, "imbalance_ratio", 1.0))
    if asked > 1 and getattr(data, "profile", None) != "none":
        return asked
    return float(f"{max(counts) / min(counts):.4g}") if counts and min(counts) > 0 else None


def _commit() -> str | None:
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
