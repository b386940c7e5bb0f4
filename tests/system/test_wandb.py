"""Two processes are one W&B run."""

import json
import os
import subprocess
import sys

from tests.command_line import ROOT
from tests.wandb_file import history


def test_two_processes_are_one_wandb_run(tmp_path):
    fit = [
        "fit", "-c", ROOT / "configs/logger/wandb.yaml", "-c", ROOT / "configs/trainer/ddp_cpu.yaml", "--data", "Digits",
        "--data.max_count", 10, "--model.backbone", "resnet20_cifar", "--trainer.max_epochs", 1, "--name", "r",
        "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    job = subprocess.run(
        [sys.executable, "-m", "etflight", *map(str, fit)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    (file,) = tmp_path.rglob("*.wandb")
    assert file.is_relative_to(tmp_path / "runs/r/wandb")
    assert [row for row in history(file) if "train/loss" in row]
    assert json.loads((tmp_path / "runs/r/run.json").read_text())["hardware"]["processes"] == 2
