"""Stopping a run on a signal: save where nothing is pending, and end a process that waits for others and cannot answer itself."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextvars import copy_context
from select import select
from types import CodeType
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from etflight.callbacks.checkpoint import LastCheckpoint, SavePoint
from etflight.runs.folder import run_folder
from etflight.utils.errors import UserError, argument, print_error
from etflight.utils.trainer import GivesBack

PATIENCE = 40.0  # seconds
_INTERVAL = 1.0  # seconds between two looks


class Patience:
    """Tells when a process that has received a signal is stuck.

    Progress means that the main thread moves from one call to another, anywhere in the program. It is stuck once it has been in one and
    the same call for 40 seconds after the signal, and for twice as long as it ever was in one before. So neither a long validation, sweep
    or figure nor a long step of a big model is cut short; only the very first step may be, and before it nothing is lost.

    Args:
        now: The time in seconds of the first look.
        place: The place of the main thread then.
    """

    def __init__(self, now: float, place: object) -> None:
        self._since, self._place = now, place
        self._longest = 0.0
        self._told: float | None = None

    def is_over(self, now: float, place: object, *, is_busy: bool = False, is_told: bool = False) -> bool:
        """Whether it is stuck, by a later look.

        Args:
            now: The time in seconds.
            place: The place of the main thread.
            is_busy: Whether it does something, such as saving, that must not be cut short.
            is_told: Whether a signal has come since the last look.
        """
        if is_told and self._told is None:
            self._told = now
        if place != self._place or is_busy:
            self._longest = max(self._longest, now - self._since)
            self._since, self._place = now, place
        return self._told is not None and now - max(self._since, self._told) > max(PATIENCE, 2 * self._longest)


class Watchdog(threading.Thread):
    """Ends a process that has received SIGTERM or SIGINT but whose main thread no longer returns from a call.

    Python runs signal handlers in the main thread, and only between two of its instructions: a process that waits in a collective for
    another which has stopped taking part never sees the signal. This thread does, through the wake-up file that C's own handler
    writes to.

    `Patience` says when. While `is_busy` is true, nothing is cut short.

    Args:
        is_busy: A function that tells whether the main thread does something, such as saving, that must not be cut short.
        end: A function that is called with the signal's number, in this thread.
    Source:
        "Execution of Python signal handlers" and `set_wakeup_fd`, https://docs.python.org/3/library/signal.html
    """

    def __init__(self, is_busy: Callable[[], bool], end: Callable[[int], None]) -> None:
        super().__init__(name="etflight-watchdog", daemon=True)
        self._is_busy, self._end = is_busy, end
        self._main = threading.main_thread().ident or 0
        self._inbox, outbox = os.pipe()
        os.set_blocking(outbox, False)
        self._outbox, self._before = outbox, signal.set_wakeup_fd(outbox, warn_on_full_buffer=False)
        self._is_over = False

    def run(self) -> None:
        """Look at the main thread until the process ends or `stop` is called."""
        patience, number = Patience(time.monotonic(), self._place()), 0
        while not self._is_over:
            ready, _, _ = select([self._inbox], [], [], _INTERVAL)
            received = {signal.SIGTERM, signal.SIGINT} & {*(os.read(self._inbox, 64) if ready else b"")}
            number = number or max(received, default=0)
            told = {"is_busy": self._is_busy(), "is_told": bool(number)}
            if patience.is_over(time.monotonic(), self._place(), **told) and not self._is_over:
                self._end(number)
                return

    def stop(self) -> None:
        """Stop looking; called by the main thread."""
        if self._is_over:
            return
        self._is_over = True
        signal.set_wakeup_fd(self._before)
        os.write(self._outbox, b"\0")
        self.join()
        os.close(self._inbox)
        os.close(self._outbox)

    def _place(self) -> list[tuple[CodeType, int]]:
        """The place of the main thread: each function on its stack, with the instruction."""
        place, frame = [], sys._current_frames().get(self._main)
        while frame is not None:
            place.append((frame.f_code, frame.f_lasti))
            frame = frame.f_back
        return place


class StopSignals(GivesBack):
    """On SIGTERM, saves at the next place where nothing is pending and exits with status 143 (128 + 15).

    If SLURM has told Lightning to requeue the job on a signal (SIGUSR1), Lightning's own handler is called at such a place instead
    of in the middle of a step, and the process exits with status 0. A validation, test or prediction just ends.

    It is enough that one process receives the signal: all processes agree on the step by an all-reduce of one integer, without waiting
    for it. If they wait for a process that has stopped taking part, no such step comes, and a `Watchdog` ends the process within a
    minute, unsaved.

    Args:
        last: The callback that saves; None where checkpoints are off or nothing is trained.
    """

    def __init__(self, last: LastCheckpoint | None) -> None:
        self._last = last
        self._requeue: dict[int, Callable[..., Any]] = {}
        self._received = 0
        self._agreed = 0
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None
        self._watchdog: Watchdog | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the watch over a process that may have to wait for others."""
        self._received = self._agreed = 0
        self._pending = None
        self._stop_watchdog()
        if trainer.world_size > 1:
            here = copy_context()  # of which a thread knows nothing by itself
            last = self._last
            is_saving = (lambda: False) if last is None else (lambda: last.is_saving)
            self._watchdog = Watchdog(is_saving, lambda number: here.run(_give_up, trainer, number))
            self._watchdog.start()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End the watch."""
        self._stop_watchdog()

    def _stop_watchdog(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare as in `on_train_start`, because training comes next."""
        self._take_over()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare to agree with the other processes."""
        self._group = dist.new_group(backend="gloo") if trainer.world_size > 1 else None
        self._take_over()

    def _take_over(self) -> None:
        """Take the place of Lightning's handlers, which call collectives and save in the middle of whatever runs."""
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            handler = signal.getsignal(number)
            if callable(handler) and handler not in (signal.default_int_handler, self._remember_signal):
                self._requeue[number] = handler
        for handled in (signal.SIGTERM, *self._requeue):
            signal.signal(handled, self._remember_signal)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once on a signal outside training, where there is nothing to save; Lightning would go on to the end."""
        if trainer.state.fn != "fit":
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))

    on_test_start = on_predict_start = on_validation_start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave between two epochs."""
        if self._agreed and (self._last is None or self._last.is_safe_between_epochs(trainer)):
            self._leave(trainer, "epochs")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Agree with the other processes, and leave between two steps."""
        self._agree(trainer)
        if self._agreed and (self._last is None or self._last.is_safe_between_steps(trainer, batch_idx)):
            self._leave(trainer, "steps")

    def _remember_signal(self, number: int, frame: object) -> None:
        self._received = max(self._received, number)

    def _agree(self, trainer: Trainer) -> None:
        if trainer.world_size == 1:
            self._agreed = self._received
            return
        if self._pending is not None:
            work, highest = self._pending
            work.wait()
            self._agreed = max(self._agreed, int(highest))
        flag = torch.tensor(self._received)
        self._pending = (dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True), flag)

    def _leave(self, trainer: Trainer, between: SavePoint) -> None:
        self._stop_watchdog()
        name = signal.Signals(self._agreed).name
        if self._last is not None:
            self._last.save(trainer, between)
            rank_zero_info(f"{name}: saved step {trainer.global_step}; {argument('ckpt_path', 'last')} resumes it")
        requeue = self._requeue.get(self._agreed)
        if requeue is not None:
            before = set(run_folder(trainer).glob("hpc_ckpt_*.ckpt"))
            requeue(self._agreed, None)
            if trainer.is_global_zero and self._last is not None:
                # what Lightning's handler has saved is the same as `last.ckpt`, and nothing else would ever remove it
                for copy in set(run_folder(trainer).glob("hpc_ckpt_*.ckpt")) - before:
                    copy.unlink()
            sys.exit(0)
        sys.exit(0 if _is_child_of_lightning(trainer) else 128 + self._agreed)


def _give_up(trainer: Trainer, number: int) -> None:
    """End this process, and those that Lightning has started from it, whatever they are doing."""
    again = f"resume with {argument('ckpt_path', 'last')}" if trainer.state.fn == "fit" else "give the command again"
    print_error(
        UserError(
            f"{signal.Signals(number).name}: ended at once, without saving, because this job makes no progress; perhaps one of its "
            f"processes has stopped taking part: find out why, then {again}"
        )
    )
    if (launcher := trainer.strategy.launcher) is not None:
        launcher.kill(signal.SIGKILL)
    os._exit(128 + number)


def _is_child_of_lightning(trainer: Trainer) -> bool:
    """Whether Lightning has started this process.

    If such a process exits with an error, Lightning kills the first process, which may still be closing its loggers.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and int(os.environ.get("LOCAL_RANK", 0)) > 0
