"""Errors and warnings for people: one line each, and one error line for all processes of a job."""

import errno
import hashlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from textwrap import shorten

from etflight.utils.terminal import plain


class UserError(ValueError):
    """Something the user gave cannot work: one line that says what, where, and the mend.

    The command line prints the message alone and exits with status 1; library callers catch it as a `ValueError`.
    """


_by_command_line = ContextVar("_by_command_line", default=False)
_NOT_GIVEN = object()


@contextmanager
def options_for_arguments() -> Iterator[None]:
    """Let messages within the block name the options of the command line in the place of Python's arguments."""
    before = _by_command_line.set(True)
    try:
        yield
    finally:
        _by_command_line.reset(before)


def argument(path: str, value: object = _NOT_GIVEN) -> str:
    """Name an argument, perhaps with a value, as the reader of a message gives it.

    Args:
        path: The option of the command line without its hyphens; in Python the argument has the last part of this name.
        value: The value.

    Example:
        >>> argument("data.val_fraction", 0.1), argument("model.head.normalize", False), argument("trainer.precision", "bf16-mixed")
        ('val_fraction=0.1', 'normalize=False', "precision='bf16-mixed'")
        >>> with options_for_arguments():
        ...     argument("data.val_fraction", 0.1), argument("model.head.normalize", False), argument("name")
        ('--data.val_fraction 0.1', '--model.head.normalize false', '--name')
    """
    if not _by_command_line.get():
        name = path.rpartition(".")[2]
        return name if value is _NOT_GIVEN else f"{name}={value!r}"
    if value is _NOT_GIVEN:
        return f"--{path}"
    in_yaml = {None: "null", True: "true", False: "false"}
    if isinstance(value, list | dict):
        return f"--{path} '{value}'"  # one word of a shell
    return f"--{path} {in_yaml[value] if value is None or isinstance(value, bool) else value}"


def user_error_in(error: BaseException | None) -> UserError | None:
    """The `UserError` that a parser or a data worker has wrapped in other errors, or None."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def let_through(error: Exception) -> None:
    """Raise an error again that may come up in any call, so that a block for the errors of one cause does not blame that cause.

    Memory has run out, the process may open no further file, or a loader process has died, which torch raises in whatever is running.
    """
    no_more_files = getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE)
    if no_more_files or is_out_of_memory(error) or is_of_dead_loader(error):
        raise error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, that of a GPU or the machine's, has run out."""
    return isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, _message(error)) is not None


def is_of_dead_loader(error: BaseException) -> bool:
    """Whether an error says that a loader process has died."""
    return "DataLoader worker" in _message(error)


def brief(error: BaseException, most: int = 200) -> str:
    """An error's message in one line of at most `most` characters; its type if it has none."""
    return shorten(str(error) or type(error).__name__, most, placeholder=" …")


def first_few(names: Iterable[str], count: int, separator: str = ", ") -> str:
    """The first three of `count` names, and how many more there are: "a, b, c and 5 more"."""
    return separator.join(islice(names, 3)) + (f" and {count - 3:,} more" if count > 3 else "")


def warn(text: str) -> None:
    """Print a warning line like the command line's own, on every call and from every process."""
    print(f"etflight: warning: {plain(text)}", file=sys.stderr, flush=True)


# --- the last line of a process that fails, which the command line alone prints ----------------------------------------

_STARTED = time.time()
_CAUSE_IS_TOLD_WITHIN = 10.0  # seconds; Lightning looks at its child processes every five
_RESUME = "then resume with --ckpt_path last"
_OUT_OF_MEMORY = r"(can't|Cannot) allocate memory|not enough memory|out of memory"
_LOST_CONNECTION = r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out|The client socket|Socket"
# the variables that identify a job; processes of SLURM get their master's address only after the start
_SLURM_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_OTHER_JOB = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def print_error(error: BaseException) -> None:
    """Print an error in one line, unless another process of this job on this machine has printed the cause or soon will."""
    if _may_have_several_processes() and _is_lost_connection(error):
        end = time.monotonic() + _CAUSE_IS_TOLD_WITHIN
        while not (is_told := _is_of_this_job(_mark_of_job())) and time.monotonic() < end:
            time.sleep(0.1)
        if is_told:
            return
        seen = re.sub(r"^\[\S+\] ", "", _message(error)).partition(". ")[0][:160]
        _print_once(f"lost another process of this job ({seen}): see its last message, {_RESUME}")
    else:
        _print_once(describe_error(error))


def print_dead_process(rank: int, status: int) -> None:
    """Print that a process of the job has ended, in one line.

    Args:
        rank: The rank of the process.
        status: Its exit status; -n if signal n has killed it.
    """
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    _print_once(f"process {rank} of this job {how}, so all of them end: find out why (out of memory?), {_RESUME}")


def describe_error(error: BaseException) -> str:
    """Describe an error in one line, however it was wrapped: by the parser, or with a traceback by a data worker."""
    wrapped = user_error_in(error)
    if wrapped is not None:
        return _message(wrapped)
    message = _message(error)
    if is_out_of_memory(error):
        return (
            f"out of memory ({message[:160]}): halve --data.batch_size and double --trainer.accumulate_grad_batches, "
            "or give --trainer.precision bf16-mixed"
        )
    if is_of_dead_loader(error):
        cause = error.__cause__ or error.__context__  # it names the signal where torch knows it
        told = cause if cause is not None and is_of_dead_loader(cause) else error
        mend = "give fewer --data.num_workers, or more memory; with 0 its own error is shown"
        return f"a loader process died, often for want of memory ({_message(told)[:160]}): {mend}"
    if "InvalidCxxCompiler" in message:  # of torch.compile on a CPU
        return "torch.compile finds no C++ compiler that works: install g++, name yours in CXX, or give --model.compile false"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's own, whose text is for people
        return message
    return f"{type(error).__name__}: {message} (ETFLIGHT_DEBUG=1 shows where)"


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a worker's exception carries its traceback as text
        text = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1])
    # text from a file may be part of the message, but must not control the terminal
    return shorten(plain(text), 1500, placeholder=" …")


def _is_lost_connection(error: BaseException) -> bool:
    if user_error_in(error) is not None:
        return False
    return type(error).__name__.startswith("Dist") or re.search(_LOST_CONNECTION, str(error)) is not None


def _may_have_several_processes() -> bool:
    """Whether the job may have several processes; Lightning has removed WORLD_SIZE by the time an error arrives here."""
    return "MASTER_PORT" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1


def _print_once(text: str) -> None:
    """Print an error if this process is the first of its job on this machine to do so; the first one creates the job's file."""
    if _may_have_several_processes():
        mark = _mark_of_job()
        if not _is_of_this_job(mark):
            mark.unlink(missing_ok=True)
        try:
            mark.touch(0o600, exist_ok=False)
        except FileExistsError:
            return
    print(f"etflight: error: {text}", file=sys.stderr, flush=True)


def _mark_of_job() -> Path:
    """The path of the file that the first process to print an error creates."""
    names = _SLURM_JOB if "SLURM_JOB_ID" in os.environ else _OTHER_JOB
    # all processes of a job have its command; a batch job may run several commands
    parts = [*(os.environ.get(name, "") for name in names), *sys.argv]
    job = hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"etflight-{os.getuid()}-{job}"


def _is_of_this_job(mark: Path) -> bool:
    """Whether the file exists and was not created by an earlier job with the same address."""
    return mark.exists() and mark.stat().st_mtime >= _STARTED
