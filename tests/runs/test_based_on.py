import json
import shutil

import pytest

from etflight.runs.based_on import chain, folder_in, identity, is_identity, options_of
from etflight.runs.record import pattern_of
from tests.training import QUIET

DATA = ["--data", "Digits", "--data.max_count", 20, "--data.batch_size", 100, *QUIET]
NETWORK = ["--model.backbone", "resnet20_cifar", "--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss"]
FIT = ["fit", *DATA, *NETWORK, "--monitor", "null"]
SHORT = ["--trainer.max_epochs", 1]
LONG = [
    "--trainer.max_epochs",
    2,
    "--data.mixup",
    1,
    "--trainer.callbacks+=ModelCheckpoint",
    "--trainer.callbacks.save_top_k",
    -1,
]
SECOND = ["--fine_tuning.load", '{"backbone": "backbone"}', "--fine_tuning.freeze", '["backbone"]']


def last(run):
    return f"runs/{run}/checkpoints/last.ckpt"


def record(cwd, run):
    return json.loads((cwd / "runs" / run / "run.json").read_text())


@pytest.fixture(scope="module")
def runs(etflight_command, tmp_path_factory):
    """Two seeds of a short training and one of another, each with a decision, a second stage and a decision for that."""
    cwd = tmp_path_factory.mktemp("runs")
    for run, seed, words in (("short", 0, SHORT), ("renamed", 1, SHORT), ("long", 2, LONG)):
        etflight_command.succeed(*FIT, *words, "--seed_everything", seed, "--name", run, cwd=cwd)
        second = [*FIT, *SECOND, *SHORT, "--fine_tuning.checkpoint", last(run), "--name", f"crt_{run}"]
        etflight_command.succeed(*second, "--seed_everything", seed, cwd=cwd)
        for trained in (run, f"crt_{run}"):
            ncm = ["test", *DATA, "--post_hoc", "NearestClassMean", "--name", f"ncm_{trained}"]
            etflight_command.succeed(*ncm, "--ckpt_path", last(trained), cwd=cwd)
    return cwd


@pytest.mark.parametrize("kind", ["ncm_{}", "crt_{}", "ncm_crt_{}"])
def test_what_starts_from_a_trained_run_has_the_identity_of_that_run_in_its_hash(kind, runs):
    short, renamed, long = (record(runs, kind.format(run)) for run in ("short", "renamed", "long"))
    assert short["config_sha256"] == renamed["config_sha256"] != long["config_sha256"]
    assert short["based_on"] == renamed["based_on"] != long["based_on"]
    trained = record(runs, kind.format("short").partition("_")[2])
    assert short["based_on"]["config_sha256"] == trained["config_sha256"]
    assert len(list(chain(short["based_on"]))) == kind.count("_")
    text = json.dumps(short["based_on"])
    assert not [word for word in ("short", "runs/", "seed_everything") if word in text]


@pytest.mark.parametrize("kind", ["ncm_{}", "ncm_crt_{}"])
def test_a_report_averages_the_seeds_of_one_training_only(kind, runs, etflight_command):
    folders = [f"runs/{kind.format(run)}" for run in ("short", "renamed", "long")]
    for folder in folders:  # one arm, as its configuration file would name it
        path = runs / folder / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"arm": "ncm"}))
    written = etflight_command.succeed("report", *folders, "--format", "json", cwd=runs)
    (runs / "results.json").write_text(written.out)
    for given in (folders, ["results.json"]):
        shown = etflight_command.succeed("report", *given, "--format", "csv", cwd=runs)
        seeds = [line.split(",")[3] for line in shown.out.splitlines()[1:]]
        assert (seeds, shown.err) == (["0 1", "2"], "")


def test_a_training_that_goes_on_keeps_what_it_was_based_on(runs, etflight_command):
    cwd, run = runs, "crt_short"
    before = record(cwd, run)
    away = (cwd / "runs/short").rename(cwd / "gone")  # what it started from is no longer needed
    again = [*FIT, *SECOND, *SHORT, "--fine_tuning.checkpoint", last("short"), "--seed_everything", 0]
    etflight_command.succeed(*again, "--name", run, "--ckpt_path", "last", cwd=cwd)
    etflight_command.succeed(*again, "--name", "elsewhere", "--ckpt_path", last(run), cwd=cwd)
    away.rename(cwd / "runs/short")
    for name in (run, "elsewhere"):
        after = record(cwd, name)
        assert [after[key] for key in ("config_sha256", "based_on")] == [
            before[key] for key in ("config_sha256", "based_on")
        ]
    longer = [*FIT, "--trainer.max_epochs", 2, "--seed_everything", 0, "--name", "longer", "--ckpt_path", last("short")]
    etflight_command.succeed(*longer, cwd=cwd)
    assert record(cwd, "longer")["based_on"]["config_sha256"] == record(cwd, "short")["config_sha256"]


def test_of_several_checkpoints_of_a_run_the_number_is_a_choice_and_of_one_it_is_what_training_came_to(
    runs, etflight_command
):
    kept = sorted((runs / "runs/long/checkpoints").glob("epoch=*"))
    assert len(kept) == 2
    etflight_command.succeed("test", *DATA, "--name", "of_two", "--ckpt_path", kept[0], cwd=runs)
    assert "checkpoint_pattern" not in record(runs, "of_two")
    only = runs / "runs/only/checkpoints" / kept[0].name
    only.parent.mkdir(parents=True)
    shutil.copy(kept[0], only)
    etflight_command.succeed("test", *DATA, "--name", "of_one", "--ckpt_path", only, cwd=runs)
    assert record(runs, "of_one")["checkpoint_pattern"] == "epoch=*-step=*"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("last", None),
        ("top5", None),
        ("09-0.71", None),  # whatever these are
        ("best-v1", "best"),
        ("epoch=9-step=675-v1", "epoch=*-step=*"),
        ("epoch=09-val_acc=0.71", "epoch=*-val_acc=*"),
        ("top5-loss=-1.5e-03", "top5-loss=*"),
        ("k=3x", None),
    ],
)
def test_the_pattern_of_a_name_blanks_what_lightning_fills_in_and_nothing_else(name, pattern, tmp_path):
    (tmp_path / f"{name}.ckpt").touch()
    (tmp_path / "other=1.ckpt").touch()
    assert pattern_of(tmp_path / f"{name}.ckpt") == pattern


def test_a_record_without_identity_has_none(tmp_path):
    for content in ({}, {"config_sha256": 3}, {"config_sha256": "c", "based_on": {"commit": "a"}}):
        (tmp_path / "run.json").write_text(json.dumps(content))
        assert identity(tmp_path) is None
    assert identity(None) is None
    (tmp_path / "run.json").write_text(
        json.dumps({"config_sha256": "c", "command": "etflight fit --name x", "commit": None})
    )
    found = identity(tmp_path)
    assert found == {"config_sha256": "c", "options": ["etflight", "fit"]}
    assert is_identity(found)


def test_a_command_tells_which_run_it_was_given():
    assert folder_in("etflight test --ckpt_path=a/runs/ce/checkpoints/last.ckpt") == ("a", "runs", "ce")
    assert folder_in("etflight fit --ckpt_path runs/ce/checkpoints/last.ckpt") is None  # where it goes on by itself
    assert folder_in("etflight fit --fine_tuning.checkpoint runs/ce/checkpoints/last.ckpt") == ("runs", "ce")
    assert [folder_in(command) for command in ("etflight test --ckpt_path last", "etflight test 'x", None, 3)] == [
        None
    ] * 4
    assert options_of("etflight fit --name x --seed_everything=1 -c a.yaml") == ("etflight", "fit", "-c", "a.yaml")
