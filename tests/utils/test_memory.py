"""Memory that is freed stays in the process: counted in page faults, each of which is a page that the kernel has cleared again."""

import ctypes
import os
import platform
from types import SimpleNamespace

import pytest

from etflight.utils.memory import keep_freed_memory
from tests.command_line import CommandLine
from tests.training import QUICK, save_arrays

COUNTS = """
import ctypes
import resource
from lightning.pytorch import Callback

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page would be one fault for 512 pages

class Faults(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if batch_idx == 4:
            self.before = now
        if trainer.is_last_batch:
            print("faults:", now - self.before)
"""
OWN = ("MALLOC_", "GLIBC_TUNABLES", "ETFLIGHT_KEEP_MEMORY")


@pytest.fixture
def no_settings(monkeypatch):
    for name in list(os.environ):
        if name.startswith(OWN):
            monkeypatch.delenv(name)


@pytest.fixture
def faults(tmp_path, no_settings):
    """`faults(**env)`: of ten steps of a training on a frozen backbone, in a process of its own."""
    save_arrays(tmp_path / "images.npz", train=240, test=10, shape=(64, 64, 3))
    (tmp_path / "counts.py").write_text(COUNTS)
    fit = ["fit", "--data", "ArrayImages", "--data.path", "images.npz", "--data.batch_size", 16, *QUICK]
    frozen = ["--model.backbone", "resnet20_cifar", "--fine_tuning.freeze", "[backbone]", "--monitor", "null"]
    linear = ["--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss"]

    def count(**env):
        command = CommandLine(tmp_path)
        try:
            more = ["--trainer.callbacks+", "counts.Faults", "--name", f"r{len(list(tmp_path.iterdir()))}"]
            done = command.succeed(*fit, *frozen, *linear, *more, cwd=tmp_path, **env)
        finally:
            command.close()
        return int(done.out.partition("faults:")[2].split()[0])

    return count


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is set is glibc's")
def test_a_training_reuses_the_memory_of_its_last_step_unless_asked_not_to(faults):
    as_it_is = faults(ETFLIGHT_KEEP_MEMORY="0")
    assert as_it_is > 5000
    assert faults() < as_it_is / 10


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.mmap_max=9"),
        ("ETFLIGHT_KEEP_MEMORY", "0"),
    ],
)
def test_the_users_own_settings_win(no_settings, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory()


def test_a_c_library_without_these_settings_is_left_alone(no_settings, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not keep_freed_memory()
