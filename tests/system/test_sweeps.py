"""Every shipped sweep: W&B's agent builds the command line, and it trains for a step."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import yaml

from tests.command_line import ended, start
from tests.training import ONE_BATCH, QUICK
from tests.wandb_file import run_record

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
STEP = [*QUICK, *ONE_BATCH, "--trainer.callbacks", "null"]


def trials(sweep):
    """Each value of each parameter at least once; of a range both ends."""
    values = {
        name: parameter.get("values") or [parameter["value"]] if "min" not in parameter
        else [parameter["min"], parameter["max"]]
        for name, parameter in sweep["parameters"].items()
    }  # fmt: skip
    most = max(map(len, values.values()))
    return [{name: given[i % len(given)] for name, given in values.items()} for i in range(most)]


def as_the_agent_starts_it(sweep, args):
    """The words behind `python -m etflight`, as `wandb agent` fills them in."""
    assert sweep["command"][:4] == ["${env}", "${interpreter}", "-m", "${program}"]
    assert sweep["command"][-1] == "${args}"
    return [*sweep["command"][4:-1], *(f"--{name}={value}" for name, value in args.items())]


@pytest.fixture
def here(tmp_path):
    """A folder like the root of the repository."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_trains_for_a_step(path, here, etflight_command):
    sweep = yaml.safe_load(path.read_text())
    assert sweep["metric"] == {"name": "val/acc_macro", "goal": "maximize"}
    assert sweep["parameters"]["data.val_fraction"] == {"value": 0.1}  # what is chosen is not chosen on test images
    for args in trials(sweep):
        unwatched = ["--trainer.logger", "null", "--trainer.fast_dev_run", "true"]
        etflight_command(*as_the_agent_starts_it(sweep, args), *STEP, *unwatched, cwd=here).ran()


def test_a_trial_is_recorded_with_its_values_and_goes_on_after_a_stop(here, etflight_command):
    sweep = yaml.safe_load(SWEEPS[0].read_text())
    args = trials(sweep)[0]
    words = as_the_agent_starts_it(sweep, args)
    # the agent's own settings
    env = {"WANDB_SWEEP_ID": "sweep7", "WANDB_RUN_ID": "again", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    ended(start("etflight", *words, *STEP, cwd=here, **env)).ran()
    etflight_command(*words, *STEP, cwd=here, **env).ran()
    (folder,) = (here / "runs").glob("*/*/again")
    record = json.loads((folder / "run.json").read_text())
    assert record["wandb_id"] == "again"
    assert {f"--{name}={value}" for name, value in args.items()} <= {*shlex.split(record["command"])}
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [(run_record(file).run_id, run_record(file).sweep_id) for file in files] == [("again", "sweep7")] * 2
