"""Kills a training at random moments, again and again, and compares what comes out with a run that was left alone.

`make soak` prints the tally.
"""

import os
import random
import signal
import subprocess
import time
import zipfile
from collections import Counter

import pytest

from tests.command_line import ended, start
from tests.left_by_runs import assert_same_run, leaves, read
from tests.system.test_resume import DIGITS, EACH_STEP, EVERYTHING, LAST, WATCHED
from tests.training import read_csv

FIT = [
    "fit", "-c", "watched.yaml", *DIGITS, *EVERYTHING, *EACH_STEP, "--data.num_workers", 2,
    "--model.model_kwargs", '{"width": 2, "drop_rate": 0.2}', "--trainer.max_epochs", 6,
    "--trainer.callbacks+=tests.left_by_runs.Footprints", "--trainer.callbacks.path", "footprints.txt",
]  # fmt: skip


def wait_for(training: subprocess.Popen[str], condition) -> bool:
    """Whether the condition came true before the training ended."""
    while training.poll() is None:
        if condition():
            return True
        time.sleep(0.0005)
    return False


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("processes", "kills"), [(1, 20), (2, 6)])
def test_a_run_killed_at_random_moments_is_the_run_that_was_left_alone(processes, kills, tmp_path):
    (tmp_path / "watched.yaml").write_text(WATCHED)
    fit = ["etflight", *FIT, *(["--trainer.strategy", "ddp", "--trainer.devices", processes] if processes > 1 else [])]
    moments, tally = random.Random(processes), Counter(processes=processes)
    steps, last = tmp_path / "footprints.txt", tmp_path / "runs/killed/checkpoints/last.ckpt"
    partial = last.with_name(".last.partial.ckpt")

    left_alone = start(*fit, "--name", "left_alone", cwd=tmp_path)
    assert wait_for(left_alone, steps.exists)
    training_begins = time.monotonic()
    ended(left_alone, timeout=3600).ran()
    seconds = time.monotonic() - training_begins
    all_batches = len(steps.read_text().split())
    resumed_from = None
    while tally["kills"] < kills or resumed_from is not None:
        steps.unlink(missing_ok=True)
        resume = [] if resumed_from is None else LAST
        training = start(*fit, "--name", "killed", *resume, cwd=tmp_path)
        stamp = last.stat().st_mtime_ns if last.exists() else 0
        was_killed = False
        if wait_for(training, steps.exists) and tally["kills"] < kills:
            wait_for(training, lambda stamp=stamp: last.exists() and last.stat().st_mtime_ns > stamp)
            end = time.monotonic() + moments.uniform(0, 0.4 * seconds)
            wait_for(training, lambda end=end: time.monotonic() > end)
            if tally["kills"] % 3 == 2:  # while it writes
                wait_for(training, lambda: partial.exists() and partial.stat().st_size > 0)
            if was_killed := training.poll() is None:
                os.killpg(training.pid, signal.SIGKILL)
        result = ended(training, timeout=3600)
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
            resumed_from = content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["ready"]
            assert resumed_from > 0
        else:
            assert_same_run(tmp_path / "runs/left_alone", tmp_path / "runs/killed")
            tally["finished_runs"] += 1
            tally["tensors_compared"] += sum(isinstance(leaf, tuple) for leaf in leaves(content).values())
            rows = read_csv(tmp_path / "runs/killed/metrics.csv")
            tally["values_compared"] += sum(bool(value) for row in rows for value in row.values())
            resumed_from = None
            (tmp_path / "runs/killed").rename(tmp_path / f"runs/finished_{tally['finished_runs']}")
    assert tally["kills"] == kills == tally["true_resumes"] + tally["kills_after_the_last_step"]
    assert tally["kills_while_writing"] > 0
    assert tally["finished_runs"] > 0
    print(dict(tally))
