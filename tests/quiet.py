"""Trainings on the CPU without bars, summaries, loggers and checkpoints."""

from typing import Any

from lightning.pytorch import Trainer

# options of `etflight`
FLAGS = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip


def trainer(**options: Any) -> Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(**{"accelerator": "cpu", "logger": False, **quiet, **options})
