"""The configuration files that come with the package, in a folder without any."""

from pathlib import Path

import pytest
import yaml

from etflight.cli import configs, study
from etflight.cli.argv import split_config_files
from etflight.utils.errors import UserError
from etflight.utils.shipped import SHIPPED, find_config, short_name

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_each_is_listed_with_what_its_comment_says(capsys):
    configs.main([])
    lines = capsys.readouterr().out.splitlines()
    for path in (ROOT / "configs").rglob("*.yaml"):
        start = path.read_text().lstrip("# ")[:20]
        assert any(line.startswith(f"  {path.stem} ") and start in line for line in lines)


def test_some_are_copied_and_none_is_overwritten(tmp_path):
    configs.main(["arms", "etf_dr", "--copy", "mine"])
    copied = sorted(path.relative_to(tmp_path / "mine") for path in (tmp_path / "mine").rglob("*.yaml"))
    assert Path("arms/etf_dr_balanced.yaml") in copied
    assert all("arms/etf_dr" in str(path) for path in copied)
    assert yaml.safe_load((tmp_path / "mine/arms/etf_dr.yaml").read_text())["model"]["head"] == "ETFHead"
    with pytest.raises(UserError, match=r"mine/arms/etf_dr\.yaml exists, and nothing is overwritten"):
        configs.main(["etf_dr", "--copy", "mine"])
    with pytest.raises(UserError, match="no configuration file has nothing_like_it in its path"):
        configs.main(["nothing_like_it"])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not a folder"):
        configs.main(["etf_dr", "--copy", "file"])


@pytest.mark.parametrize("name", ["configs/data/digits.yaml", "data/digits.yaml", "data/digits"])
def test_a_name_stands_for_the_shipped_file_unless_there_is_one(name, tmp_path):
    assert split_config_files("etflight fit", ["-c", name, "--name", "x"]) == (
        [str(SHIPPED / "data/digits.yaml")],
        ["--name", "x"],
    )
    own = tmp_path / name
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    assert find_config(name) == Path(name)


def test_a_shipped_file_has_a_short_name_unless_another_file_has_it_or_it_is_the_users(tmp_path):
    file, name = (SHIPPED / "data/digits.yaml").resolve(), Path("configs/data/digits.yaml")
    assert short_name(file) == name
    assert find_config(short_name(file)).resolve() == file
    assert short_name(tmp_path / "data/digits.yaml") == tmp_path / "data/digits.yaml"
    name.parent.mkdir(parents=True)
    name.write_text("{}")
    assert short_name(file) == file


def test_a_study_that_came_with_the_package_prints_commands_that_any_installation_can_run(capsys):
    study.main(["configs/studies/digits.yaml", "--dry-run", "--arms", "ce", "--seeds", "0"])
    assert capsys.readouterr().out.splitlines()[0] == (
        "etflight fit -c configs/data/digits.yaml -c configs/arms/ce.yaml --seed_everything 0 --name digits/ce/seed0 --ckpt_path last"
    )


@pytest.mark.parametrize("name", ["data/none", "../etflight/cli/stages.py", "{}", "/data/digits", "configs"])
def test_names_that_are_not_shipped_files_stay_as_given(name):
    assert split_config_files("etflight fit", ["-c", name])[0] == [name]
