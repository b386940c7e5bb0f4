"""A study as its processes run it."""

import json
import time

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

SET = {
    "seed_everything": 0,
    "data": {"class_path": "Digits", "init_args": {"imbalance_ratio": 2}},
    "model": {"backbone": "resnet20_cifar"},
    "trainer": {"max_epochs": 1, "limit_train_batches": 1, "limit_test_batches": 1, "enable_progress_bar": False},
}
ARMS = {
    "ce": {"head": "LinearHead", "loss": "CrossEntropyLoss"},
    "la": {"head": "LinearHead", "loss": "CrossEntropyLoss", "logit_adjustment": 1.0},
    "broken": {"surprise": 1},
}


@pytest.mark.timeout(900)  # a dozen processes
def test_what_can_be_trained_and_tested_is_once_and_what_fails_is_named(etflight_command, tmp_path):
    for file, content in {"data/tiny": SET, **{f"arms/{arm}": {"model": model} for arm, model in ARMS.items()}}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content))
    study = {"configs": ".", "sets": ["tiny"], "seeds": [0], "arms": ["broken", "ce"], "post_hoc": {"la": "ce"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    first = etflight_command("study", "study.yaml", "--jobs", "2", cwd=tmp_path)
    assert first.status == 1
    (line,) = first.error_lines
    assert all(words in line for words in ("1 of 3 runs failed", "surprise", "fit.log"))
    trained, adjusted = (tmp_path / "runs/tiny" / arm / "seed0" for arm in ("ce", "la"))
    results = [run / "test_metrics.json" for run in (trained, adjusted)]
    assert all("test/acc" in json.loads(file.read_text()) for file in results)
    assert not (adjusted / "checkpoints").exists()  # it tests the other's
    assert [arm for arm in ARMS if f" {arm} " in first.out] == ["ce", "la"]

    written = {file: file.stat().st_mtime_ns for file in (*results, trained / "metrics.csv")}
    again = etflight_command("study", "study.yaml", "--arms", "ce", "la", cwd=tmp_path).ran()
    assert "…" not in again.out.splitlines()[0]
    assert {file: file.stat().st_mtime_ns for file in written} == written

    results[0].unlink()  # trained, but not tested
    etflight_command("study", "study.yaml", "--arms", "ce", cwd=tmp_path).ran()
    assert results[0].is_file()
    assert (trained / "metrics.csv").stat().st_mtime_ns == written[trained / "metrics.csv"]


def test_nothing_starts_from_a_training_that_has_not_ended(tmp_path, monkeypatch, capsys):
    for file, content in {"data/tiny": SET, **{f"arms/{arm}": {"model": ARMS[arm]} for arm in ("ce", "la")}}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content))
    study = {"configs": ".", "sets": ["tiny"], "seeds": [0], "arms": ["ce"], "post_hoc": {"la": "ce"}}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    (tmp_path / "runs/tiny/ce/seed0/checkpoints").mkdir(parents=True)  # a training that was stopped
    (tmp_path / "runs/tiny/ce/seed0/checkpoints/last.ckpt").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError,
        match="starts from runs/tiny/ce/seed0, which has not been trained and tested to its end",
    ):
        main(["study.yaml", "--arms", "la"])
    assert not (tmp_path / "runs/tiny/la").exists()


@pytest.mark.timeout(900)
def test_a_second_stage_of_a_fine_tuned_first_starts_from_it_and_its_backbone_stays_frozen(etflight_command, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("resnet20_cifar", num_classes=7)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
    tuned = {"fine_tuning": {"weights": "w.safetensors", "freeze": ["backbone"], "unfreeze_epoch": 1}}
    trainer = SET["trainer"] | {"max_epochs": 2}
    own = {"load": {"backbone": "backbone", "head": "head.linear"}, "freeze": ["backbone", "head.linear"]}
    lws = {"head": "ScaledLinearHead", "loss": "CrossEntropyLoss"}
    for file, content in {
        "data/plain": SET | {"trainer": trainer},
        "data/tuned": SET | {"trainer": trainer} | tuned,
        "protocols/tuned": tuned,
        "arms/ce": {"model": ARMS["ce"]},
        "arms/lws": {"first_stage": "ce", "fine_tuning": own, "model": lws, "trainer": {"max_epochs": 2}},
    }.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content))
    for name, suffix, set_name in (("of_the_set", "", "tuned"), ("of_the_arms", "+tuned", "plain")):
        study = {"configs": ".", "sets": [set_name], "seeds": [0], "arms": [f"ce{suffix}"]}
        study["second_stage"] = {f"lws{suffix}": f"ce{suffix}"}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(study))
        etflight_command("study", f"{name}.yaml", cwd=tmp_path).ran()
        first, second = (
            read(tmp_path / "runs" / set_name / arm.replace("+", "_") / "seed0")
            for arm in (f"ce{suffix}", f"lws{suffix}")
        )
        before, after = first["state_dict"], second["state_dict"]
        for key in (key for key in before if key.startswith("backbone.")):
            assert torch.equal(after[key], before[key]), key
        assert torch.equal(after["head.linear.weight"], before["head.weight"])
        assert not torch.equal(after["head.class_scale"], torch.ones(10))
        assert not torch.equal(before["backbone.layer1.0.conv1.weight"], network.state_dict()["layer1.0.conv1.weight"])
        log = (tmp_path / "runs" / set_name / f"lws{suffix}".replace("+", "_") / "seed0/fit.log").read_text()
        assert "what its files say of the first one's weights and frozen parts is left out" in log


@pytest.mark.timeout(600)
def test_sigterm_reaches_the_run_which_saves_and_starts_no_other(tmp_path):
    long = {**SET, "trainer": {"max_epochs": 100, "limit_train_batches": 1, "enable_progress_bar": False}}
    for file, content in {"data/tiny": long, "arms/ce": {"model": ARMS["ce"]}}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / f"{file}.yaml").write_text(yaml.safe_dump(content))
    study = {"configs": ".", "sets": ["tiny"], "seeds": [0, 1], "arms": ["ce"]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))

    process = start("etflight", "study", "study.yaml", cwd=tmp_path)
    first = tmp_path / "runs/tiny/ce/seed0"
    until = time.monotonic() + 200
    while not list(first.glob("checkpoints/last.ckpt")):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.1)
    process.terminate()

    assert ended(process).status == 143
    assert "SIGTERM: saved step" in (first / "fit.log").read_text()
    assert not (tmp_path / "runs/tiny/ce/seed1").exists()
