"""Starts Python programs as processes of their own, for promises about processes: kills, launchers, what happens at exit."""

import os
import subprocess
import sys
from pathlib import Path

from tests.command_line import ROOT, Result


def start(*words: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """`python -m …` in a session of its own, so that all its processes can be killed at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **env}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], timeout: float = 250) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


def finish(*processes: subprocess.Popen[str]) -> str:
    """What they printed, all together; they have to succeed."""
    results = [ended(process) for process in processes]
    printed = "".join(result.out + result.err for result in results)
    assert [result.status for result in results] == [0] * len(results), printed
    return printed
