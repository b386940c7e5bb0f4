"""Kills a training at random moments, again and again, and compares what comes out with a run that was left alone.

`make soak` prints the tally and writes it to soak.json.
"""

import json
import os
import random
import signal
import subprocess
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from tests.command_line import ended, start
from tests.left_by_runs import assert_same_run, count_tensors, logged_values, read

ROOT = Path(__file__).parents[2]
FIT = [
    "fit", "--data", "Digits", "--data.imbalance_ratio", "20", "--data.batch_size", "32", "--data.crop_padding", "1",
    "--data.mixup", "0.5", "--data.val_fraction", "0.1", "--data.sampler", "balanced", "--data.num_workers", "2",
    "--model.backbone", "resnet20_cifar", "--model.model_kwargs", '{"width": 2, "drop_rate": 0.2}',
    "--model.lr_scheduler", "WarmupCosine", "--model.loss.class_balance", "batch",
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", "6", "--trainer.log_every_n_steps", "1",
    "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "0.5", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--checkpoint.every_n_steps", "1", "-c", "watched.yaml",
]  # fmt: skip
WATCHED = """
trainer:
  callbacks:
    - class_path: etflight.callbacks.NeuralCollapseMonitor
    - class_path: etflight.callbacks.ExponentialMovingAverage
      init_args: {decay: 0.9}
    - class_path: lightning.pytorch.callbacks.LearningRateMonitor
    - class_path: tests.left_by_runs.Footprints
      init_args: {path: footprints.txt}
"""


def train(cwd: Path, options: list[str], *more: str) -> subprocess.Popen[str]:
    return start("etflight", *FIT, *options, *more, cwd=cwd)


def is_running(training: subprocess.Popen[str]) -> bool:
    return training.poll() is None


def wait_for(training: subprocess.Popen[str], condition) -> bool:
    """Whether the condition came true before the training ended."""
    while is_running(training):
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 6)])
def test_a_run_killed_at_random_moments_is_the_run_that_was_left_alone(processes, kills, tmp_path):
    (tmp_path / "watched.yaml").write_text(WATCHED)
    options = ["--trainer.strategy", "ddp", "--trainer.devices", str(processes)] if processes > 1 else []
    moments, tally = random.Random(processes), Counter(processes=processes)
    steps, last = tmp_path / "footprints.txt", tmp_path / "runs/killed/checkpoints/last.ckpt"
    partial = last.with_name(".last.partial.ckpt")

    left_alone = train(tmp_path, options, "--name", "left_alone")
    assert wait_for(left_alone, steps.exists)
    training_begins = time.monotonic()
    ended(left_alone, timeout=3600).ran()
    seconds = time.monotonic() - training_begins
    all_batches = len(steps.read_text().split())
    resumed_from = None
    while tally["kills"] < kills or resumed_from is not None:
        steps.unlink(missing_ok=True)
        resume = [] if resumed_from is None else ["--ckpt_path", "last"]
        training = train(tmp_path, options, "--name", "killed", *resume)
        stamp = last.stat().st_mtime_ns if last.exists() else 0
        reached = wait_for(training, steps.exists)
        if tally["kills"] < kills and reached:
            aims_at_writing = tally["kills"] % 3 == 2
            wait_for(training, lambda stamp=stamp: last.exists() and last.stat().st_mtime_ns > stamp)
            end = time.monotonic() + moments.uniform(0, 0.4 * seconds)
            wait_for(training, lambda end=end: time.monotonic() > end)
            if aims_at_writing:
                wait_for(training, lambda: partial.exists() and partial.stat().st_size > 0)
        elif is_running(training):
            training.wait()
        was_killed = is_running(training)
        if was_killed:
            os.killpg(training.pid, signal.SIGKILL)
        result = ended(training)
        assert was_killed or result.status == 0, result.err
        if resumed_from is not None:
            assert "Restored all states from the checkpoint" in result.err
            if steps.exists():
                first = int(steps.read_text().split()[0])
                assert first == resumed_from, "the first batch is not the one after the checkpoint"
                tally["true_resumes"] += 1
            else:
                assert resumed_from == all_batches, "a resumed run that trains nothing"
                tally["kills_after_the_last_step"] += 1
        with zipfile.ZipFile(last) as archive:
            assert archive.testzip() is None
        content = read(last.parent.parent)
        if was_killed:
            tally["kills"] += 1
            tally["kills_while_writing"] += partial.exists()
            tally["whole_checkpoints"] += 1
            resumed_from = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
            assert resumed_from > 0
        else:
            assert_same_run(tmp_path / "runs/left_alone", tmp_path / "runs/killed")
            tally["finished_runs"] += 1
            tally["tensors_compared"] += count_tensors(content)
            tally["values_compared"] += logged_values(tmp_path / "runs/killed")
            resumed_from = None
            (tmp_path / "runs/killed").rename(tmp_path / f"runs/finished_{tally['finished_runs']}")
    assert tally["kills"] == kills == tally["true_resumes"] + tally["kills_after_the_last_step"]
    assert tally["kills_while_writing"] > 0
    assert tally["finished_runs"] > 0
    print(json.dumps(tally))
    report = ROOT / "soak.json"
    tallies = json.loads(report.read_text()) if report.exists() else {}
    report.write_text(json.dumps({**tallies, f"{processes} processes": tally}, indent=2) + "\n")
