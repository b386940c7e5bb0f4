"""What a fresh interpreter imports before a command has anything to do; how long that takes is measured by `make bench`."""

import re
import subprocess
import sys

import pytest

from etflight import __version__

# each takes from a tenth of a second to seconds
HEAVY = {"timm", "torchvision", "sklearn", "scipy", "matplotlib", "PIL", "wandb", "pandas", "tensorboard"}


def imported(*argv: str, status: int = 0, prints: str = "") -> set[str]:
    """Every module that a fresh `python ARGV` imports, as the interpreter itself reports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *argv], capture_output=True, text=True)
    assert (done.returncode, prints in done.stdout) == (status, True), done.stderr
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))


def test_help_imports_no_heavy_package_that_lightning_does_not():
    """Lightning's own metrics import matplotlib and torchvision where they are installed."""
    ours, lightnings = imported("-m", "etflight", "fit", "--help"), imported("-c", "import lightning.pytorch.cli")
    assert {"lightning.pytorch.cli", "etflight.data.base", "etflight.heads"} <= ours
    assert {name for name in ours - lightnings if name.split(".")[0] in HEAVY} == set()


@pytest.mark.parametrize(
    ("argv", "status", "prints", "module"),
    [
        (["-m", "etflight", "--version"], 0, f"etflight {__version__}\n", "etflight.cli"),
        (["-m", "etflight", "tset"], 2, "", "etflight.cli"),
        (["-m", "etflight", "study", "--help"], 0, "--dry-run", "etflight.runs.study"),
        (["-c", "import etflight"], 0, "", "etflight"),
    ],
)
def test_what_trains_nothing_imports_neither_torch_nor_lightning(argv, status, prints, module):
    modules = imported(*argv, status=status, prints=prints)
    assert module in modules
    assert not {name.split(".")[0] for name in modules} & {"torch", "lightning", "numpy", *HEAVY}
    if module == "etflight":
        assert {name for name in modules if name.startswith("etflight")} == {"etflight"}


def test_describing_a_set_needs_no_model():
    modules = imported("-m", "etflight", "describe", "--help")
    assert "etflight.cli.data_option" in modules
    assert not {"timm", "etflight.classifier", "etflight.backbones"} & modules
