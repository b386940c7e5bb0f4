"""What the program says when it fails: one line, once for all processes of a job."""

import hashlib
import logging
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path
from textwrap import shorten

from etflight.utils.errors import user_error_in
from etflight.utils.terminal import plain

_STARTED = time.time()
_ROOT_CAUSE_COMES_WITHIN = 10.0  # seconds; Lightning looks after its child processes every five
_OUT_OF_MEMORY = r"can't allocate memory|not enough memory|out of memory"
_LOST_CONNECTION = r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Timed out|The client socket|Socket"
# what tells one job from another; SLURM's processes learn their master's address only on the way
_SLURM_JOB = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_OTHER_JOB = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


def say(error: BaseException) -> None:
    """Print the error in one line, unless another process of the job on this machine has said or will say the cause."""
    if _is_several_processes() and _is_lost_connection(error):
        if _somebody_speaks_within(_ROOT_CAUSE_COMES_WITHIN) or not _has_the_word():
            return
        seen = re.sub(r"^\[\S+\] ", "", _message(error)).partition(". ")[0][:160]
        _print(f"lost another process of this job ({seen}): see what it said last, {_RESUME}")
    elif _has_the_word():
        _print(one_line(error))


def one_line(error: BaseException) -> str:
    """What went wrong, in one line, wherever it was wrapped: by the parser, or with a traceback by a data worker."""
    wrapped = user_error_in(error)
    if wrapped is not None:
        return _message(wrapped)
    message = _message(error)
    if isinstance(error, MemoryError) or re.search(_OUT_OF_MEMORY, message):
        return (
            f"out of memory ({message[:160]}): halve --data.batch_size and double --trainer.accumulate_grad_batches, "
            "or give --trainer.precision bf16-mixed"
        )
    if "DataLoader worker" in message:
        return f"a loader process died ({message[:160]}), often for want of memory: give a smaller --data.num_workers"
    return f"{type(error).__name__}: {message} (ETFLIGHT_DEBUG=1 shows where)"


def speak_for_lost_processes() -> None:
    """Put Lightning's report of a dead child process, before it ends the others, into our words."""
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").addFilter(_in_our_words)


_RESUME = "then resume with --ckpt_path last"


def _in_our_words(record: logging.LogRecord) -> bool:
    found = re.search(r"rank: (\d+)\].*terminated with code (-?\d+)", record.getMessage())
    if found is None:
        return True
    rank, code = int(found.group(1)), int(found.group(2))
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    if _has_the_word():
        _print(f"process {rank} of this job {how}, so all of them end: find out why (out of memory?), {_RESUME}")
    return False


def _print(text: str) -> None:
    print(f"etflight: error: {text}", file=sys.stderr, flush=True)


def _message(error: BaseException) -> str:
    text = str(error).strip()
    if "Original Traceback" in text:  # a worker's exception carries its traceback as text
        text = re.sub(r"^[\w.]*(Error|Exception): ", "", text.splitlines()[-1])
    # what a file says may be part of the message, but commands no terminal
    return shorten(plain(text), 1500, placeholder=" …")


def _is_lost_connection(error: BaseException) -> bool:
    if user_error_in(error) is not None:
        return False
    return type(error).__name__.startswith("Dist") or re.search(_LOST_CONNECTION, str(error)) is not None


def _is_several_processes() -> bool:
    """Whether there may be more: Lightning has removed WORLD_SIZE by the time an error arrives here."""
    return "MASTER_PORT" in os.environ or int(os.environ.get("SLURM_NTASKS") or 1) > 1


def _word() -> Path:
    """A file whose maker speaks for all processes of this job on this machine."""
    names = _SLURM_JOB if "SLURM_JOB_ID" in os.environ else _OTHER_JOB
    job = hashlib.sha256("|".join(os.environ.get(name, "") for name in names).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"etflight-{os.getuid()}-{job}"


def _has_the_word() -> bool:
    """Whether this process may speak: it is alone, or the first."""
    if not _is_several_processes():
        return True
    word = _word()
    if not _is_fresh(word):
        word.unlink(missing_ok=True)  # of an earlier job with the same address
    try:
        os.close(os.open(word, os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        return False
    return True


def _somebody_speaks_within(seconds: float) -> bool:
    word, end = _word(), time.monotonic() + seconds
    while time.monotonic() < end:
        if _is_fresh(word):
            return True
        time.sleep(0.1)
    return False


def _is_fresh(word: Path) -> bool:
    return word.exists() and word.stat().st_mtime >= _STARTED
