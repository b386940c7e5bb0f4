"""Random numbers that depend on the step alone."""

import os
import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seeds torch, NumPy and Python from (seed, step, rank) before each training step.

    So dropout, stochastic depth and whatever else a step draws repeat in a resumed run, and differ from rank to rank. The seed is the
    one of `seed_everything`, or else torch's own at the start, which the checkpoint keeps.
    """

    def __init__(self) -> None:
        self._seed: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the seed."""
        given = os.environ.get("PL_GLOBAL_SEED")  # where Lightning's seed_everything puts it
        if given is not None:
            self._seed = int(given)
        elif self._seed is None:
            self._seed = torch.initial_seed() % 2**32

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed."""
        key = [self._seed or 0, trainer.fit_loop.total_batch_idx, trainer.global_rank]
        first, second, third, fourth = np.random.SeedSequence(key).generate_state(4).tolist()
        # not torch.manual_seed, which asks every kind of device that torch knows
        torch.default_generator.manual_seed(first << 32 | second)
        if pl_module.device.type != "cpu":
            torch.get_device_module(pl_module.device).manual_seed(first << 32 | second)
        np.random.seed(third)
        random.seed(fourth)

    def state_dict(self) -> dict[str, Any]:
        """The seed."""
        return {"seed": self._seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the seed back."""
        self._seed = state_dict["seed"]
