"""What the command line imports before it has anything to do; how long that takes is measured by `make bench`."""

import re
import subprocess
import sys

import pytest

# each takes from a tenth of a second to seconds
HEAVY = ("timm", "torchvision", "sklearn", "scipy", "matplotlib", "PIL", "wandb", "pandas", "tensorboard")


def imported(*argv: str, status: int = 0) -> set[str]:
    """Every module that a fresh `python ARGV` imports, as the interpreter itself reports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *argv], capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return set(re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))


def test_help_imports_no_heavy_package_that_lightning_does_not():
    """Lightning's own metrics import matplotlib and torchvision where they are installed."""
    ours, lightnings = imported("-m", "etflight", "fit", "--help"), imported("-c", "import lightning.pytorch.cli")
    assert {"lightning.pytorch.cli", "etflight.data.base", "etflight.heads"} <= ours
    assert {name for name in ours - lightnings if name.split(".")[0] in HEAVY} == set()


@pytest.mark.parametrize(("argv", "status"), [(["--version"], 0), (["--help"], 0), ([], 2), (["tset"], 2)])
def test_version_and_the_table_of_commands_import_neither_torch_nor_lightning(argv, status):
    modules = imported("-m", "etflight", *argv, status=status)
    assert "etflight" in modules
    assert not {name.split(".")[0] for name in modules} & {"torch", "lightning", "numpy", *HEAVY}


def test_the_package_itself_imports_nothing():
    modules = imported("-c", "import etflight")
    assert {name for name in modules if name.startswith("etflight")} == {"etflight"}
    assert not {name.split(".")[0] for name in modules} & {"torch", "lightning", "numpy", *HEAVY}


def test_describing_a_set_needs_no_model():
    modules = imported("-m", "etflight", "describe", "--help")
    assert "etflight.cli.data_option" in modules
    assert not {"timm", "etflight.classifier", "etflight.backbones"} & modules


def test_planning_a_study_needs_no_torch():
    modules = imported("-m", "etflight", "study", "--help")
    assert "etflight.runs.study" in modules
    assert not {name.split(".")[0] for name in modules} & {"torch", "lightning", "numpy", *HEAVY}
