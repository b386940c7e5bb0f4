import re
from pathlib import Path

import pytest
import yaml

from etflight.runs.study import Study, read_study
from etflight.utils.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """`write(**study)`: a study of three arms, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for file in ("data/tiny", "arms/ce", "arms/la", "arms/focal", "protocols/short", "trainer/wide"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text("{}")

    def write(**study):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({"configs": ".", "sets": ["tiny"], "seeds": [0], "arms": ["ce"], **study}))
        return path

    return write


def test_every_run_has_its_own_command(write, etflight_command, tmp_path):
    write(seeds=[3, 4], ratios=[1, 50], arms=["ce"], second_stage={"focal": "ce"}, post_hoc={"la": "focal"})
    result = etflight_command("study", "study.yaml", "--dry-run", cwd=tmp_path)
    lines = result.out.splitlines()
    assert len(set(lines)) == len(lines) == 4 * (2 + 2 + 1)
    assert lines[2:4] == [
        "etflight fit -c data/tiny.yaml -c arms/ce.yaml --seed_everything 3 --data.imbalance_ratio 50 --name tiny/ce/ratio50-seed3 "
        "--ckpt_path last",
        "etflight test -c data/tiny.yaml -c arms/ce.yaml --seed_everything 3 --data.imbalance_ratio 50 --name tiny/ce/ratio50-seed3 "
        "--ckpt_path runs/tiny/ce/ratio50-seed3/checkpoints/last.ckpt",
    ]
    assert lines[8] == (
        "etflight fit -c data/tiny.yaml -c arms/focal.yaml --seed_everything 3 --data.imbalance_ratio 1 --name tiny/focal/ratio1-seed3 "
        "--fine_tuning.checkpoint runs/tiny/ce/ratio1-seed3/checkpoints/last.ckpt --ckpt_path last"
    )
    assert lines[16].endswith(
        "--name tiny/la/ratio1-seed3 --ckpt_path runs/tiny/focal/ratio1-seed3/checkpoints/last.ckpt"
    )
    assert not (tmp_path / "runs").exists()


def test_files_that_are_not_beside_a_study_are_the_shipped_ones(write):
    study = read_study(write(sets=["tiny", "digits"], arms=["ce", "etf_dr", "etf_ce+mixup"]))
    assert study.sets == {"tiny": [Path("data/tiny.yaml")], "digits": [Path("configs/data/digits.yaml")]}
    assert study.arms["ce"] == [Path("arms/ce.yaml")]  # the user's own comes first
    assert study.arms["etf_ce_mixup"] == [Path("configs/arms/etf_ce.yaml"), Path("configs/protocols/mixup.yaml")]


def test_subsets_vary_with_every_seed(write, etflight_command, tmp_path):
    write(seeds=[0, 1], data_seeds=[7, 8], ratios=[50], arms=["ce"])
    lines = etflight_command("study", "study.yaml", "--dry-run", cwd=tmp_path).out.splitlines()
    assert len(lines) == 2 * 2 * 2
    assert (
        "--seed_everything 0 --data.imbalance_ratio 50 --data.seed 8 --name tiny/ce/ratio50-subset8-seed0" in lines[2]
    )


def test_sets_and_arms_are_named_with_what_is_laid_over_them(write, etflight_command, tmp_path):
    sets = {"tiny_short": ["tiny", "short"], "tiny_wide": ["tiny", "short", "wide"]}
    write(arms=["ce", "focal+short"], sets=sets, post_hoc={"la": "focal+short"}, ratios=[2])
    lines = etflight_command("study", "study.yaml", "--dry-run", cwd=tmp_path).out.splitlines()
    fits = [line.partition(" --ckpt_path")[0] for line in lines if line.startswith("etflight fit")]
    assert fits == [
        f"etflight fit {files} {arm_files} --seed_everything 0 --data.imbalance_ratio 2 --name {name}/{arm}/ratio2-seed0"
        for arm, arm_files in (("ce", "-c arms/ce.yaml"), ("focal_short", "-c arms/focal.yaml -c protocols/short.yaml"))
        for name, files in (
            ("tiny_short", "-c data/tiny.yaml -c protocols/short.yaml"),
            ("tiny_wide", "-c data/tiny.yaml -c protocols/short.yaml -c trainer/wide.yaml"),
        )
    ]
    assert lines[-1].endswith(
        "--name tiny_wide/la/ratio2-seed0 --ckpt_path runs/tiny_wide/focal_short/ratio2-seed0/checkpoints/last.ckpt"
    )


def test_options_choose_a_part_of_a_study(write, etflight_command, tmp_path):
    write(seeds=[3, 4], arms=["ce", "focal"])
    result = etflight_command("study", "study.yaml", "--dry-run", "--arms", "focal", "--seeds", "4", cwd=tmp_path)
    assert [line.split()[1] for line in result.out.splitlines()] == ["fit", "test"]
    assert "tiny/focal/seed4" in result.out
    for given, unknown in (
        (["--arms", "ce", "la"], "study.yaml has no arm la: give some of ce, focal to --arms"),
        (["--seeds", "5"], "study.yaml has no seed 5: give some of 3, 4 to --seeds"),
    ):
        etflight_command("study", "study.yaml", *given, cwd=tmp_path).assert_refused(unknown)


NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")


def test_a_download_is_asked_for_of_the_sets_that_have_one_by_the_option_of_each(write, etflight_command, tmp_path):
    write(sets=["fashion_mnist_lt", "cifar10_sessions", "digits", "yangs"], arms=["ce"])
    (tmp_path / "data/yangs.yaml").write_text("data: {class_path: mine.Set}")
    options = "study", "study.yaml", "--dry-run", "--data.download", "true"
    lines = etflight_command(*options, cwd=tmp_path).ran().out.splitlines()
    given = [word for line in lines for word in re.findall(r"--data\S* true|--name \w+", line)]
    assert given == [
        *["--data.download true", "--name fashion_mnist_lt"] * 2,
        *["--data.images.download true", "--name cifar10_sessions"] * 2,
        *["--name digits"] * 2,
        *["--data.download true", "--name yangs"] * 2,
    ]
    nothing = etflight_command(*options, "--sets", "digits", cwd=tmp_path)
    nothing.assert_refused("none of these sets can be downloaded: leave --data.download out")


def test_missing_images_are_downloaded_if_a_study_is_told_to(write, etflight_command, tmp_path):
    """Nobody answers here, so that the download fails, with the line that says it was tried."""
    write(sets=["stl10_lt"], arms=["ce"])
    without = etflight_command("study", "study.yaml", cwd=tmp_path)
    without.assert_refused("STL10 in data", "is missing: put the files there, or give --data.download true")
    asked = etflight_command("study", "study.yaml", "--data.download", "true", cwd=tmp_path, **NO_NETWORK)
    asked.assert_refused("STL10 in data: the download failed")


@pytest.mark.parametrize(
    ("study", "line"),
    [
        ({"arms": ["cee"]}, r"arms/cee\.yaml: near matches: .*/arms/ce\.yaml"),
        ({"arms": "ce"}, "arms: expected list, got ce"),
        ({"seeds": ["a"]}, "seeds: expected int, got a"),
        ({"second_stage": ["ce"]}, "second_stage: expected dict"),
        ({"post_hoc": {"la": "focal"}}, "la starts from focal, which is not trained before it"),
        ({"sets": ["tinny"]}, r"data/tinny\.yaml"),
        ({"sets": {"short": "short"}}, "sets: expected list"),
        ({"sets": {"short": ["no"]}}, r"data/no\.yaml"),
        ({"sets": {"../elsewhere": ["tiny"]}}, "give letters, digits and _"),
        ({"arms": ["/elsewhere/ce"]}, "the arm '/elsewhere/ce' names a folder"),
        ({"arms": ["../arms/ce"]}, "the arm '../arms/ce' names a folder"),
        ({"arms": ["ce+shrt"]}, r"protocols/shrt\.yaml"),
        ({"epochs": 3}, "is not a study: --epochs: there is no such option"),
    ],
    ids=str,
)
def test_a_file_that_is_no_study_is_refused(write, study, line):
    with pytest.raises(UserError, match=line):
        read_study(write(**study))


@pytest.mark.parametrize("path", sorted((ROOT / "configs/studies").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_studies_are_whole(path):
    study = read_study(path)
    assert isinstance(study, Study)
    cells = [cell for stage in study.stages() for cell in stage]
    assert len({cell.folder for cell in cells}) == len(cells) > 0
