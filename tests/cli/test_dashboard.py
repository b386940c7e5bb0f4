import json
import sys

import pytest

from etflight.cli import dashboard
from etflight.runs.wandb import CURVES, PICTURES, TESTED
from etflight.utils.errors import UserError

PLACE = ["--entity", "somebody", "--project", "etflight"]


@pytest.fixture
def printed(capsys):
    dashboard.main([*PLACE, "--group", "digits", "--dry-run"])
    return json.loads(capsys.readouterr().out)


def test_the_workspace_has_its_sections(printed):
    sections = printed["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    assert [section["name"] for section in sections][:4] == ["Accuracy and shots", "Collapse", "Geometry", "Speed"]
    assert all(section["panels"] for section in sections[:4])


def test_the_report_groups_one_experiment_by_arm_and_both_show_what_is_listed(printed):
    report, workspace = json.dumps(printed["report"]), json.dumps(printed["workspace"])
    assert '"grouping": [{"section": "config", "name": "arm.value"}]' in report
    assert "digits" in report
    assert all(
        f'"{key}"' in workspace for part in (*CURVES.values(), PICTURES) for keys in part.values() for key in keys
    )
    assert all(f'"{key}"' in report for keys in TESTED.values() for key in keys)


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
    etflight_command("dashboard", *PLACE, cwd=tmp_path, **env).assert_refused(*words)
