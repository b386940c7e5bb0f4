"""What starting up costs beside importing torch and Lightning, which nothing can do without; in fresh interpreters."""

import resource
import subprocess
import sys
from functools import partial

import pytest

pytestmark = pytest.mark.benchmark


def run(*argv):
    subprocess.run([sys.executable, *argv], stdout=subprocess.DEVNULL, check=True)


def seconds_of_children():
    """Processor seconds: what another load on the machine takes does not count."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_importing_the_package_adds_nothing_to_importing_torch(median_ratio, record_ratio):
    torch, ours = (partial(run, "-c", f"import {names}") for names in ("torch", "torch, etflight"))
    ratio = median_ratio(ours, torch, repeats=9, clock=seconds_of_children)
    record_ratio("import torch, etflight / import torch", ratio, 1.05)


def test_help_takes_little_longer_than_the_imports_of_lightnings_own_command_line(median_ratio, record_ratio):
    imports = partial(run, "-c", "import torch; import lightning.pytorch.cli")
    ratio = median_ratio(partial(run, "-m", "etflight", "fit", "--help"), imports, repeats=7, clock=seconds_of_children)
    record_ratio("etflight fit --help / import torch and lightning.pytorch.cli", ratio, 1.2)
