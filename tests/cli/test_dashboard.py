import json
import sys
from pathlib import Path

import pytest

from etflight.cli import dashboard
from etflight.utils.errors import UserError
from tests.wandb_file import config_updates, history

ROOT = Path(__file__).parents[2] / "configs"
PLACE = ["--entity", "somebody", "--project", "etflight"]


@pytest.fixture
def printed(capsys):
    dashboard.main([*PLACE, "--group", "digits", "--dry-run"])
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    """Names of all that a tiny run and its test have sent to W&B, and of its configuration."""
    cwd = tmp_path_factory.mktemp("run")
    common = [
        "-c", ROOT / "data/digits.yaml", "-c", ROOT / "arms/etf_dr_balanced.yaml", "-c", ROOT / "logger/wandb.yaml",
        "--trainer.max_epochs", 1, "--trainer.accelerator", "cpu",
    ]  # fmt: skip
    for argv in (["fit", *common], ["test", *common, "--ckpt_path", "last"]):
        etflight_command.succeed(*argv, cwd=cwd, WANDB_MODE="offline", WANDB_SILENT="true")
    files = list(cwd.rglob("*.wandb"))
    assert len(files) == 2
    keys = {key for file in files for row in history(file) for key in row}
    config = {key: value for file in files for update in config_updates(file) for key, value in update.items()}
    return keys | {key.rpartition("/")[0] for key in keys if key.endswith("/_type")}, config


def find(content, *names):
    """What stands under these names, wherever they are."""
    if isinstance(content, list):
        return [value for part in content for value in find(part, *names)]
    if not isinstance(content, dict):
        return []
    here = [value for name, value in content.items() if name in names]
    return here + [value for name, part in content.items() if name not in names for value in find(part, *names)]


@pytest.mark.parametrize("part", ["workspace", "report"])
def test_every_metric_it_shows_is_logged(part, printed, run):
    logged, _ = run
    shown = find(printed[part], "metrics", "mediaKeys", "xAxis")
    shown = [name for value in shown for name in (value if isinstance(value, list) else [value])]
    assert {"val/acc_few", "nc/train/nc1", "speed/images_per_s", "nc/heat_map"} <= set(shown) or part == "report"
    assert {"test/acc", "nc/train/alignment"} <= set(shown) or part == "workspace"
    assert {name for name in shown if name not in logged} == set()


def test_the_workspace_has_its_sections(printed):
    sections = printed["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:4] == ["Accuracy and shots", "Collapse", "Geometry", "Speed"]
    assert all(section["panels"] for section in sections[:4])


def test_the_report_groups_one_experiment_by_arm(printed, run):
    (runs,) = find(printed["report"], "runSets")[0]
    assert runs["grouping"] == [{"section": "config", "name": "arm.value"}]
    assert "digits" in json.dumps(runs["filters"])
    _, config = run
    assert config["arm"] == "etf_dr_balanced"


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'etflight\[dashboard\]'"):
        dashboard.main([*PLACE, "--dry-run"])


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"WANDB_API_KEY": "", "NETRC": "/nowhere", "HOME": "/nowhere"}, ["wandb login"]),
        ({"WANDB_API_KEY": 40 * "0", "WANDB_BASE_URL": "http://127.0.0.1:9"}, ["somebody/etflight", "127.0.0.1:9"]),
    ],
    ids=["nobody is logged in", "no server"],
)
def test_what_keeps_it_from_being_sent_is_told_in_one_line(env, words, etflight_command, tmp_path):
    result = etflight_command("dashboard", *PLACE, cwd=tmp_path, **env)
    assert result.status == 1
    (line,) = result.error_lines
    assert all(word in line for word in words)
