"""Runs `etflight …` in processes of their own: forked from one that has imported the package, or started afresh."""

import json
import os
import pty
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.waiting import DEADLINE

ROOT = Path(__file__).parent.parent
SERVER = """
import json, os, sys, traceback, wandb
import etflight.cli.stages, etflight.backbones, sklearn.datasets
from etflight.__main__ import run
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        for number, name in enumerate((os.devnull, job["out"], job["err"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        sys.argv = ["etflight", *job["argv"]]
        try:
            status = run()
        except SystemExit as stop:
            status = stop.code or 0
        except BaseException:
            traceback.print_exc()
            status = 99
        if wandb.run is not None:
            wandb.finish()  # as at the end of any process; other exit functions would remove the parent's temporary files
        sys.stdout.flush(); sys.stderr.flush()
        os._exit(status)
    _, status = os.waitpid(pid, 0)
    print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
"""


@dataclass
class Result:
    status: int
    out: str
    err: str

    @property
    def error_lines(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("etflight: error:")]

    def ran(self) -> Self:
        """Check that it succeeded."""
        assert self.status == 0, self.err
        return self

    def assert_refused(self, *words: str) -> None:
        """Check that it failed with one line of error, which has these words, and without a traceback."""
        assert self.status in (1, 2), self.err
        (line,) = self.error_lines
        assert not [word for word in words if word not in line], line
        assert "Traceback" not in self.out + self.err


class CommandLine:
    """One parent process for the whole test session: importing torch and Lightning takes seconds, forking does not.

    Args:
        folder: for the output of the commands.
        env: more of the parent's environment, for what is looked at when a package is imported.
    """

    def __init__(self, folder: Path, **env: str) -> None:
        self._folder = folder
        self._count = 0
        # wandb leaves the address of this process's own service in the environment, pytest-xdist the width of its terminal
        own = {name for name in os.environ if name.startswith("WANDB_") or name in ("COLUMNS", "LINES")}
        environment = {name: value for name, value in os.environ.items() if name not in own} | env
        # the tests' own callbacks and loggers
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self, *argv: object, cwd: Path, terminal: str | None = None, **env: str) -> Result:
        self._count += 1
        out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        job = {
            "argv": [str(a) for a in argv],
            "cwd": str(cwd),
            "env": env,
            "out": terminal or str(out),
            "err": str(err),
        }
        assert self._server.stdin
        assert self._server.stdout
        print(json.dumps(job), file=self._server.stdin, flush=True)
        status = json.loads(self._server.stdout.readline())
        return Result(status, "" if terminal else out.read_text(), err.read_text())

    def succeed(self, *argv: object, cwd: Path, **env: str) -> Result:
        """Run a command that has to succeed."""
        return self(*argv, cwd=cwd, **env).ran()

    def in_terminal(self, *argv: object, cwd: Path, **env: str) -> str:
        """What a terminal of 300 columns is sent, control characters included; the command has to succeed."""
        ours, theirs = pty.openpty()
        sent: list[bytes] = []

        def read() -> None:
            with suppress(OSError):  # Linux's way to say that the other side has been closed
                while part := os.read(ours, 4096):
                    sent.append(part)

        reader = threading.Thread(target=read)
        reader.start()
        try:
            result = self(*argv, cwd=cwd, terminal=os.ttyname(theirs), TERM="xterm", COLUMNS="300", LINES="50", **env)
        finally:
            os.close(theirs)
            reader.join()
            os.close(ours)
        result.ran()
        return b"".join(sent).decode()

    def close(self) -> None:
        self._server.kill()
        self._server.wait()


def start(*words: object, cwd: Path, **env: str) -> subprocess.Popen[str]:
    """`python -m …` as a new process in a session of its own, so that all its processes can be killed at once."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    environment |= {"GLOO_SOCKET_IFNAME": "lo", **env}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)], cwd=cwd, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], timeout: float = DEADLINE) -> Result:
    """Wait for its end."""
    out, err = process.communicate(timeout=timeout)
    return Result(process.returncode, out, err)


def finish(*processes: subprocess.Popen[str]) -> str:
    """What they printed, all together; they have to succeed."""
    results = [ended(process) for process in processes]
    printed = "".join(result.out + result.err for result in results)
    assert [result.status for result in results] == [0] * len(results), printed
    return printed
