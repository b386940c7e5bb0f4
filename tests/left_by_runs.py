"""Comparing what two runs left on disk, bit by bit; and a callback that kills its own process."""

import os
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from etflight.cli.stages import main
from tests.command_line import CommandLine


class Kill(Callback):
    """Sends a signal to its own process at the end of a batch, counted over the whole run.

    Args:
        after: the batch, from 0.
        signal: its number, 9 for SIGKILL.
        rank: of the process that gets it.
        mark: a file that is made then; nothing happens while it is there.
    """

    def __init__(self, after: int, signal: int = 9, rank: int = 0, mark: str = "killed.mark") -> None:
        self.after, self.signal, self.rank, self.mark = after, signal, rank, Path(mark)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        due = trainer.fit_loop.total_batch_idx == self.after and trainer.global_rank == self.rank
        if due and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), self.signal)


def kill(after: int, **options: Any) -> list[Any]:
    """Words of a command line that give a training such a callback."""
    given = {"after": after, **options}.items()
    words = [word for name, value in given for word in (f"--trainer.callbacks.{name}", value)]
    return ["--trainer.callbacks+=tests.left_by_runs.Kill", *words]


class AtBatch(Callback):
    """Does something at the end of a batch.

    Args:
        after: the batch, counted from 0 over the whole run.
    """

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.after:
            self.act(pl_module)

    def act(self, model: LightningModule) -> None:
        raise NotImplementedError


class InterruptError(Exception):
    """What `Interrupt` raises."""


class Interrupt(AtBatch):
    """Ends a training within this process: what is on disk is what SIGKILL would have left."""

    def act(self, model: LightningModule) -> None:
        raise InterruptError


class LimitFiles(AtBatch):
    """Lets no file grow beyond 100 kB from then on: what is written then fails as on a full disk."""

    def act(self, model: LightningModule) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


class Spoil(AtBatch):
    """Makes a weight infinite, as a step that is far too long would."""

    def act(self, model: LightningModule) -> None:
        next(model.parameters()).data[0] = float("inf")


def assert_resumes(
    fit: list[Any], root: Path, kills: Sequence[int], before_resuming: Callable[[], Any] = lambda: None
) -> None:
    """Check that runs which were interrupted after these batches resume as the run that was not, which is left in `root/whole`.

    Args:
        fit: arguments of `etflight`.
        root: the folder of the runs.
        kills: batches, counted from 0; every step is saved.
        before_resuming: what happens between the two halves.
    """
    argv = [*map(str, fit), "--trainer.default_root_dir", str(root), "--checkpoint.every_n_steps", "1", "--name"]
    main([*argv, "whole"])
    interrupt = ["--trainer.callbacks+=tests.left_by_runs.Interrupt", "--trainer.callbacks.after"]
    for after in kills:
        with pytest.raises(InterruptError):
            main([*argv, f"killed_{after}", *interrupt, str(after)])
        assert read(root / f"killed_{after}")["global_step"] == after
    before_resuming()
    for after in kills:
        main([*argv, f"killed_{after}", "--ckpt_path", "last"])
        assert_same_run(root / "whole", root / f"killed_{after}")


def assert_killed_run_resumes(command: CommandLine, cwd: Path, fit: list[Any], after: int, every: int = 1) -> None:
    """Check that a run which was killed at the end of a batch resumes as the run that was not, `runs/whole`.

    Args:
        command: runs `etflight`.
        cwd: the current folder of the runs.
        fit: arguments of `etflight`.
        after: the batch, counted from 0.
        every: steps between checkpoints.
    """
    name = f"killed_{after}"
    argv = [*fit, "--name", name, "--checkpoint.every_n_steps", every]
    assert command(*argv, *kill(after, mark=f"{name}.mark"), cwd=cwd).status == -9
    assert 0 < read(cwd / "runs" / name)["global_step"] < read(cwd / "runs/whole")["global_step"]
    assert "Restored all states" in command(*argv, "--ckpt_path", "last", cwd=cwd).ran().err
    assert_same_run(cwd / "runs/whole", cwd / "runs" / name)


class Footprints(Callback):
    """Appends the number of each batch that is trained, counted over the whole run, to a file.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.is_global_zero:
            with open(self.path, "a") as file:
                print(trainer.fit_loop.total_batch_idx, file=file)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def leaves(value: Any, place: str = "") -> dict[str, Any]:
    """What a nest of plain data and tensors holds, by its place; comparable bit by bit (NaN equals NaN)."""
    if isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return {place: (value.dtype, value.shape, data)}
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        found: dict[str, Any] = {place: type(value)}
        for key, part in parts:
            found |= leaves(part, f"{place}/{key}")
        return found
    return {place: repr(value)}


def differences(one: Any, other: Any) -> list[str]:
    """The places at which two nests differ."""
    ours, theirs = leaves(one), leaves(other)
    return sorted(place for place in ours | theirs if ours.get(place) != theirs.get(place))


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, optimizer, schedule, averages, counters, collapse curves; and every row of `metrics.csv`."""
    assert differences(read(one), read(other)) == []
    assert (one / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
