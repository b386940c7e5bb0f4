"""Every shipped sweep: W&B's agent builds the command line, and it trains for a step."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from wandb import wandb_agent
from wandb.sdk.launch.sweeps.utils import load_sweep_config

from tests.command_line import ended, start
from tests.wandb_file import config_updates, run_record

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
STEP = [
    "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
    "--trainer.accelerator", "cpu", "--trainer.callbacks", "null",
]  # fmt: skip


def trials(sweep):
    """Each value of each parameter at least once; of a range both ends."""
    values = {
        name: parameter.get("values") or [parameter["value"]] if "min" not in parameter
        else [parameter["min"], parameter["max"]]
        for name, parameter in sweep["parameters"].items()
    }  # fmt: skip
    most = max(map(len, values.values()))
    return [{name: {"value": given[i % len(given)]} for name, given in values.items()} for i in range(most)]


def as_the_agent_starts_it(sweep, run_id, args, monkeypatch, folder):
    """The words and the environment of the process that `wandb agent` starts for a trial, by its own code."""
    started = {}

    class Process:
        def __init__(self, **kwargs):
            started.update(kwargs)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Process)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep7")
    monkeypatch.setenv("WANDB_DIR", str(folder))
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # the agent leaves them in its own environment
        monkeypatch.setenv(name, "")
    agent = object.__new__(wandb_agent.Agent)
    agent._sweep_command, agent._function, agent._in_jupyter = list(sweep["command"]), None, False
    agent._forward_signals, agent._run_processes = False, {}
    agent._command_run({"type": "run", "run_id": run_id, "program": sweep["program"], "args": args})
    # not the service of a run that this process itself may have had
    return started["command"], {
        name: value for name, value in started["env"].items() if name.startswith("WANDB_") and name != "WANDB_SERVICE"
    }


@pytest.fixture
def here(tmp_path):
    """A folder like the root of the repository."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_value_of_a_sweep_trains_for_a_step(path, here, etflight_command, monkeypatch):
    sweep = load_sweep_config(str(path))
    for i, args in enumerate(trials(sweep)):
        words, _ = as_the_agent_starts_it(sweep, f"trial{i}", args, monkeypatch, here)
        assert words[:4] == ["/usr/bin/env", "python", "-m", "etflight"]
        assert all(f"--{name}={given['value']}" in words for name, given in args.items())
        unwatched = ["--trainer.logger", "null", "--trainer.fast_dev_run", "true"]
        result = etflight_command(*words[4:], *STEP, *unwatched, cwd=here)
        assert result.status == 0, result.err


def part_of(config, name):
    """What the resolved configuration has for an option, in `init_args` where it is an argument of a class."""
    for key in name.split("."):
        config = config[key] if key in config else config["init_args"][key]
    return config


def test_a_trial_is_recorded_with_its_values_and_goes_on_after_a_stop(here, etflight_command, monkeypatch):
    sweep = load_sweep_config(str(SWEEPS[0]))
    args = trials(sweep)[0]
    words, env = as_the_agent_starts_it(sweep, "again", args, monkeypatch, here)
    env |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    first = ended(start(*words[3:], *STEP, cwd=here, **env))
    second = etflight_command(*words[4:], *STEP, cwd=here, **env)
    for result in (first, second):
        assert result.status == 0, result.err
    (folder,) = (here / "runs").glob("*/*/again")
    assert json.loads((folder / "run.json").read_text())["wandb_id"] == "again"
    files = list(folder.glob("wandb/offline-run-*/*.wandb"))
    assert [(run_record(file).run_id, run_record(file).sweep_id) for file in files] == [("again", "sweep7")] * 2
    told = {key: value for update in config_updates(files[0]) for key, value in update.items()}
    assert {name: told[name] for name in args} == {name: given["value"] for name, given in args.items()}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["data"]["init_args"]["val_fraction"] == 0.1  # what is chosen is not chosen on test images
    for name, given in args.items():
        assert str(given["value"]) in str(part_of(config, name)), name


def test_a_sweep_says_what_it_is_after_and_chooses_by_a_logged_number():
    for path in SWEEPS:
        sweep = load_sweep_config(str(path))
        assert sweep["metric"] == {"name": "val/acc_macro", "goal": "maximize"}
        assert sweep["method"] in ("grid", "random", "bayes")
    swept = {name for path in SWEEPS for name in load_sweep_config(str(path))["parameters"]}
    optimizer = {"model.optimizer.lr", "model.optimizer.weight_decay"}
    assert swept >= optimizer | {"model.head", "model.loss", "data.imbalance_ratio"}
