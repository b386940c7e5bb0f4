import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch._inductor.config
from torch.utils.data import DataLoader, Dataset

from etflight.checkpoint.files import SafeCheckpointIO, read_checkpoint
from etflight.checkpoint.specs import objections
from etflight.utils import errors
from etflight.utils.errors import UserError, describe_error, print_dead_process, print_error, user_error_in


def test_the_users_error_is_found_below_whatever_wrapped_it():
    inner = UserError("what, where, the mend")
    outer = TypeError("wrapped")
    outer.__cause__ = RuntimeError("wrapped once")
    outer.__cause__.__context__ = inner
    assert user_error_in(outer) is inner
    assert user_error_in(TypeError("alone")) is None
    assert user_error_in(None) is None


def test_where_no_compiler_is_torch_compile_names_the_mend(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = torch.compile(lambda x: x.sin() + 1, backend="inductor")
    no_compiler = torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")})
    with no_compiler, pytest.raises(Exception, match="InvalidCxxCompiler") as caught:
        compiled(torch.zeros(3))
    assert "install g++" in describe_error(caught.value)


@pytest.fixture
def job(tmp_path, monkeypatch):
    """This process is one of several of a job, whose first error is told by a file in an empty folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(errors, "_CAUSE_IS_TOLD_WITHIN", 0.2)
    monkeypatch.setenv("MASTER_PORT", "29500")
    return tmp_path


LOST = RuntimeError("[/pytorch/gloo.cc:1] Connection closed by peer. More")


def test_a_job_prints_its_cause_once_and_no_lost_connection_after_it(job, capsys):
    print_error(UserError("the cause"))
    for error in (UserError("the cause"), LOST):
        print_error(error)
    print_dead_process(1, -9)
    assert capsys.readouterr().err == "etflight: error: the cause\n"


def test_a_job_tells_a_lost_connection_where_nobody_tells_the_cause(job, capsys):
    print_error(LOST)
    print_dead_process(1, -9)
    assert capsys.readouterr().err == (
        "etflight: error: lost another process of this job (Connection closed by peer): see its last message, "
        "then resume with --ckpt_path last\n"
    )


def test_the_file_of_an_earlier_job_with_the_same_address_silences_nobody(job, capsys):
    print_error(UserError("of the earlier job"))
    (mark,) = job.iterdir()
    os.utime(mark, (0, 0))
    print_dead_process(1, -9)
    assert "process 1 of this job was killed by SIGKILL" in capsys.readouterr().err.splitlines()[1]


def test_another_command_of_the_same_batch_job_tells_its_own_cause(job, monkeypatch, capsys):
    for arm in ("ce", "etf_dr"):
        monkeypatch.setattr("sys.argv", ["etflight", "fit", "-c", f"arms/{arm}"])
        print_error(UserError(f"the cause of {arm}"))
    assert capsys.readouterr().err == "etflight: error: the cause of ce\netflight: error: the cause of etf_dr\n"


def test_a_process_alone_prints_every_error(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    monkeypatch.delenv("SLURM_NTASKS", raising=False)
    print_error(UserError("one\nline"))
    print_error(MemoryError("of what"))
    first, second = capsys.readouterr().err.splitlines()
    assert first == "etflight: error: one line"
    assert "halve --data.batch_size" in second


def test_a_reader_that_leaves_ends_the_command_in_silence():
    ours, theirs = os.pipe()
    os.close(ours)
    words = [sys.executable, "-m", "etflight", "configs"]
    ended = subprocess.run(words, stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    os.close(theirs)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


class Fatal(Dataset):
    """Its one image sends a signal to the process that reads it."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 1

    def __getitem__(self, position):
        os.kill(os.getpid(), self.number)
        time.sleep(60)


def told(number):
    """The line about a loader process that this signal has killed."""
    try:
        next(iter(DataLoader(Fatal(number), num_workers=1)))
    except RuntimeError as error:
        return describe_error(error)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_loader_process_that_a_signal_killed_is_told_with_the_signal_and_the_mend(number):
    # in a process of its own: after a training Lightning has put back the handler of signals by which torch learns the signal
    code = f"from tests.utils.test_errors import told; print(told({int(number)}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    line = done.stdout
    assert f"killed by signal: {signal.strsignal(number)}" in line
    assert "give fewer --data.num_workers, or more memory; with 0 its own error is shown" in line


DIED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")


@pytest.mark.parametrize(
    "error", [DIED, MemoryError(), RuntimeError("CUDA out of memory. Tried"), OSError(errno.EMFILE, "Too many")]
)
def test_what_may_come_up_in_any_call_is_blamed_on_none(error, tmp_path):
    class Part:
        def __reduce__(self):
            raise error

    def move(*_):
        raise error

    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(type(error)) as read:
        read_checkpoint(tmp_path / "a.ckpt", map_location=move)
    with pytest.raises(type(error)) as saved:
        SafeCheckpointIO().save_checkpoint({"part": Part()}, tmp_path / "b.ckpt")
    with pytest.raises(type(error)) as made, objections({"class_path": "a.Head", "init_args": {}}, "head"):
        raise error
    assert [read.value, saved.value, made.value] == [error] * 3


def test_an_error_that_is_not_the_disks_is_not_blamed_on_the_disk(tmp_path):
    class Part:
        def __reduce__(self):
            raise RuntimeError("a device failed")

    with pytest.raises(RuntimeError, match="a device failed") as caught:
        SafeCheckpointIO().save_checkpoint({"part": Part()}, tmp_path / "b.ckpt")
    assert user_error_in(caught.value) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_checkpoint_for_a_device_that_is_not_there_is_not_called_damaged(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=r"deserialize object on a CUDA device.*: give cpu as map_location") as caught:
        read_checkpoint(tmp_path / "a.ckpt", map_location="cuda")
    assert "damaged" not in str(caught.value)
