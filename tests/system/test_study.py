"""A study as its processes run it."""

import json

import pytest
import safetensors.torch
import timm
import torch
import yaml

import etflight.backbones  # noqa: F401  registers the models
from etflight.cli.study import main
from etflight.utils.errors import UserError
from tests.command_line import ended, start
from tests.left_by_runs import read
from tests.waiting import wait_until

TRAINER = {"max_epochs": 1, "limit_train_batches": 1, "limit_test_batches": 1, "enable_progress_bar": False}
SET = {
    "seed_everything": 0,
    "data": {"class_path": "Digits", "init_args": {"imbalance_ratio": 2, "max_count": 10}},
    "model": {"backbone": "resnet20_cifar"},
    "trainer": TRAINER,
}
CE = {"head": "LinearHead", "loss": "CrossEntropyLoss"}
ARMS = {
    "ce": {"model": CE},
    "la": {"model": CE | {"logit_adjustment": 1.0}},
    "broken": {"model": {"surprise": 1}},
    "lws": {
        "first_stage": "ce",
        "fine_tuning": {"load": {"backbone": "backbone", "head": "head.linear"}, "freeze": ["backbone", "head.linear"]},
        "model": CE | {"head": "ScaledLinearHead"},
        "trainer": {"max_epochs": 2},
    },
}


def write(folder, trainer=TRAINER, protocol=None, **study):
    """`study.yaml` of one set and of these arms in a folder."""
    files = {"data/tiny": SET | {"trainer": trainer}, "protocols/tuned": protocol or {}}
    files |= {f"arms/{arm}": content for arm, content in ARMS.items()}
    files["study"] = {"configs": ".", "sets": ["tiny"], "seeds": [0], "arms": ["ce"]} | study
    for file, content in files.items():
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / f"{file}.yaml").write_text(yaml.safe_dump(content))


def test_what_can_be_trained_and_tested_is_once_and_what_fails_is_named(etflight_command, tmp_path):
    write(tmp_path, arms=["broken", "ce"], post_hoc={"la": "ce"})
    first = etflight_command("study", "study.yaml", "--jobs", "2", cwd=tmp_path)
    first.assert_refused("1 of 3 runs failed", "surprise", "fit.log")
    trained, adjusted = (tmp_path / "runs/tiny" / arm / "seed0" for arm in ("ce", "la"))
    results = [run / "test_metrics.json" for run in (trained, adjusted)]
    assert all("test/acc" in json.loads(file.read_text()) for file in results)
    assert not (adjusted / "checkpoints").exists()  # it tests the other's
    assert [arm for arm in ARMS if f" {arm} " in first.out] == ["ce", "la"]

    written = {file: file.stat().st_mtime_ns for file in (*results, trained / "metrics.csv")}
    etflight_command("study", "study.yaml", "--arms", "ce", "la", cwd=tmp_path).ran()
    assert {file: file.stat().st_mtime_ns for file in written} == written

    results[0].unlink()  # trained, but not tested
    etflight_command("study", "study.yaml", "--arms", "ce", cwd=tmp_path).ran()
    assert results[0].is_file()
    assert (trained / "metrics.csv").stat().st_mtime_ns == written[trained / "metrics.csv"]


def test_nothing_starts_from_a_training_that_has_not_ended(tmp_path, monkeypatch):
    write(tmp_path, post_hoc={"la": "ce"})
    stopped = tmp_path / "runs/tiny/ce/seed0/checkpoints/last.ckpt"
    stopped.parent.mkdir(parents=True)
    stopped.touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="starts from runs/tiny/ce/seed0, which has not been"):
        main(["study.yaml", "--arms", "la"])
    assert not (tmp_path / "runs/tiny/la").exists()


def test_a_second_stage_of_a_fine_tuned_first_starts_from_it_and_its_backbone_stays_frozen(etflight_command, tmp_path):
    """Whichever file says how the first one is tuned; `tests/cli/test_second_stage.py` has the others."""
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar", num_classes=7)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    tuned = {"fine_tuning": {"weights": "w.safetensors", "freeze": ["backbone"], "unfreeze_epoch": 1}}
    stages = {"arms": ["ce+tuned"], "second_stage": {"lws+tuned": "ce+tuned"}}
    write(tmp_path, TRAINER | {"max_epochs": 2}, tuned, **stages)
    etflight_command("study", "study.yaml", cwd=tmp_path).ran()
    runs = [tmp_path / "runs/tiny" / arm / "seed0" for arm in ("ce_tuned", "lws_tuned")]
    before, after = (read(run)["state_dict"] for run in runs)
    assert not [key for key in before if key.startswith("backbone.") and not torch.equal(after[key], before[key])]
    assert torch.equal(after["head.linear.weight"], before["head.weight"])
    assert not torch.equal(after["head.class_scale"], torch.ones(10))
    assert not torch.equal(before["backbone.layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])


def test_sigterm_reaches_the_run_which_saves_and_starts_no_other(tmp_path):
    write(tmp_path, TRAINER | {"max_epochs": 100}, seeds=[0, 1])
    process = start("etflight", "study", "study.yaml", cwd=tmp_path)
    runs = tmp_path / "runs/tiny/ce"
    wait_until((runs / "seed0/checkpoints/last.ckpt").exists, process=process)
    process.terminate()
    assert ended(process).status == 143
    assert "SIGTERM: saved step" in (runs / "seed0/fit.log").read_text()
    assert not (runs / "seed1").exists()
