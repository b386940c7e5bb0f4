import csv
import inspect
import json
import shlex
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import etflight
from etflight import Classifier, DotRegressionLoss
from etflight.cli.stages import main
from etflight.data import Digits
from etflight.runs.record import config_sha256, training_facts

ROOT = Path(__file__).parents[2]
QUICK = [
    "--trainer.max_epochs", 1, "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    "--trainer.accelerator", "cpu",
]  # fmt: skip
ONE_BATCH = ["--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1]
DIGITS = ["--data", "Digits", "--data.imbalance_ratio", 20, "--model.backbone", "resnet20_cifar", *QUICK]


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    """A finished run of one epoch: the folder it was started in, and its run folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    result = etflight_command("fit", *DIGITS, "--name", "first", cwd=cwd)
    assert result.status == 0, result.err
    return cwd, cwd / "runs" / "first"


def test_a_run_leaves_its_folder_and_nothing_else(run):
    cwd, folder = run
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "run.json", "metrics.csv", "checkpoints"}
    assert {p.name for p in cwd.iterdir()} == {"runs"}
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0
    assert sum(record["data"]["class_counts"]) == 431
    assert record["data"]["validation"] == "the test set, watched only"
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert any(row["train/loss"] for row in rows)
    assert {"val/acc", "val/acc_many", "val/acc_few", "val/ece", "val/loss"} <= rows[0].keys()


def test_the_record_tells_the_configuration_but_for_what_tells_seeds_apart(run):
    record = json.loads((run[1] / "run.json").read_text())
    config = yaml.safe_load((run[1] / "config.yaml").read_text())
    assert record["config_sha256"] == config_sha256(config)
    trainer = config["trainer"] | {"default_root_dir": "elsewhere", "logger": "WandbLogger"}
    seed = config | {"seed_everything": 1, "name": "other", "ckpt_path": "last", "trainer": trainer}
    longer = config | {"trainer": config["trainer"] | {"max_epochs": 2}}
    assert record["config_sha256"] == config_sha256(seed) != config_sha256(longer)
    first, other = (config | {"fine_tuning": {"checkpoint": path, "freeze": ["backbone"]}} for path in "ab")
    assert config_sha256(first) == config_sha256(other) != record["config_sha256"]
    assert shlex.split(record["command"]) == ["etflight", "fit", *map(str, DIGITS), "--name", "first"]
    assert record["data"]["imbalance_ratio"] == 20
    assert record["hardware"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({"imbalance_ratio": 20}, 20),
        ({"imbalance_ratio": 20, "profile": "none"}, 1.073),  # as the set is: 133 to 124 images a class
        ({"profile": [100] * 5 + [25] * 5}, 4),
    ],
)
def test_the_ratio_on_record_is_the_one_asked_for_or_that_of_the_images(options, ratio):
    assert training_facts(seed=0, data=Digits(**options))["data"]["imbalance_ratio"] == ratio


def test_the_rate_of_each_epoch_is_logged(etflight_command, tmp_path):
    schedule = ["--model.optimizer.lr", 0.4, "--model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR"]
    result = etflight_command(
        "fit",
        *DIGITS,
        *schedule,
        "--model.lr_scheduler.gamma",
        0.5,
        "--trainer.max_epochs",
        3,
        *ONE_BATCH,
        "--name",
        "r",
        cwd=tmp_path,
    )
    assert result.status == 0, result.err
    rows = csv.DictReader((tmp_path / "runs/r/metrics.csv").open())
    assert [float(row["train/lr"]) for row in rows if row["train/lr"]] == pytest.approx([0.4, 0.2, 0.1])


def test_a_logger_that_would_delete_the_runs_own_numbers_is_refused(etflight_command, tmp_path):
    logger = ["--trainer.logger", "CSVLogger", "--trainer.logger.name", "", "--trainer.logger.version", ""]
    result = etflight_command("fit", *DIGITS, *logger, cwd=tmp_path)
    assert result.status == 1
    assert result.error_lines == [
        "etflight: error: CSVLogger would delete the run's own metrics.csv: give --trainer.logger.name or leave it out"
    ]


def test_checkpoint_is_plain_data_and_stays_plain_when_saved_again(run, tmp_path):
    path = run[1] / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["hyper_parameters"]["head"]["class_path"] == "etflight.ETFHead"
    assert "_instantiator" not in checkpoint["hyper_parameters"]
    assert checkpoint["class_names"] == [str(k) for k in range(10)]
    model = Classifier.load_from_checkpoint(path)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "again.ckpt")
    again = Classifier.load_from_checkpoint(tmp_path / "again.ckpt")
    assert torch.equal(again.head.weight, model.head.weight)


def test_test_rebuilds_the_model_from_the_checkpoint_alone(run, etflight_command, tmp_path):
    checkpoint = run[1] / "checkpoints" / "last.ckpt"
    result = etflight_command("test", "--data", "Digits", "--ckpt_path", checkpoint, *QUICK[2:], cwd=tmp_path)
    assert result.status == 0, result.err
    metrics = json.loads((run[1] / "test_metrics.json").read_text())
    names = (
        "acc",
        "acc_macro",
        "acc_many",
        "acc_medium",
        "acc_few",
        "acc_head",
        "acc_tail",
        "acc_worst",
        "acc_harmonic",
        "ece",
    )
    assert {f"test/{name}" for name in names} <= metrics.keys()
    rows = list(csv.DictReader((run[1] / "per_class.csv").open()))
    assert len(rows) == 10
    assert sum(float(row["acc"]) for row in rows) / 10 == pytest.approx(metrics["test/acc_macro"], abs=1e-6)
    assert int(rows[0]["train_images"]) > int(rows[-1]["train_images"])
    assert result.out.count("Test: 500 images of 10 classes") == 1
    assert "test/acc" not in result.out  # Lightning's own table
    figures = {path.name for path in (run[1] / "figures").iterdir()}
    assert figures >= {"reliability.png", "confusion.png", "per_class.png"}
    assert list(tmp_path.iterdir()) == []


def test_results_go_to_the_run_of_the_checkpoint_whatever_the_configuration_is_called(run, etflight_command, tmp_path):
    checkpoint = run[1] / "checkpoints" / "last.ckpt"
    files = ["-c", ROOT / "configs/data/digits.yaml", "-c", ROOT / "configs/arms/etf_dr.yaml"]
    argv = ["test", *files, "--ckpt_path", checkpoint, *QUICK[2:]]
    (run[1] / "test_metrics.json").unlink(missing_ok=True)
    result = etflight_command(*argv, cwd=tmp_path)
    assert result.status == 0, result.err
    assert (run[1] / "test_metrics.json").is_file()
    assert list(tmp_path.iterdir()) == []
    adjusted = ["--model.logit_adjustment", 1, "--name", "elsewhere", "--verbose", "false"]
    named = etflight_command(*argv, *adjusted, cwd=tmp_path)
    assert named.status == 0, named.err
    assert "Test: 500 images" not in named.out
    assert (tmp_path / "runs/elsewhere/test_metrics.json").is_file()
    config = yaml.safe_load((tmp_path / "runs/elsewhere/config.yaml").read_text())
    assert config["model"]["logit_adjustment"] == 1  # the checkpoint says 0


def test_predict_writes_one_row_per_image_in_order(run, etflight_command, tmp_path):
    checkpoint = run[1] / "checkpoints" / "last.ckpt"
    result = etflight_command("predict", "--data", "Digits", "--ckpt_path", checkpoint, *QUICK[2:], cwd=tmp_path)
    assert result.status == 0, result.err
    rows = list(csv.DictReader((run[1] / "predictions.csv").open()))
    assert len(rows) == 500
    assert all(0 < float(row["probability"]) <= 1 for row in rows)


def test_a_folder_with_a_checkpoint_is_refused_and_untouched(run, etflight_command):
    cwd, folder = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    result = etflight_command("fit", *DIGITS, "--name", "first", cwd=cwd)
    assert result.status == 1
    assert len(result.error_lines) == 1
    assert "--ckpt_path last" in result.error_lines[0]
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_last_resumes_this_run_and_continues_its_metrics(etflight_command, tmp_path):
    """The logger is one that asks for a folder, which it gets in that of the run."""
    fit = ["fit", *DIGITS, *ONE_BATCH, "--trainer.logger", "TensorBoardLogger", "--name", "r", "--ckpt_path", "last"]
    first = etflight_command(*fit, cwd=tmp_path)
    assert first.status == 0, first.err
    assert "starts from scratch" in first.err + first.out
    run = tmp_path / "runs/r"
    started = json.loads((run / "run.json").read_text())
    second = etflight_command(*fit, "--trainer.max_epochs", 2, cwd=tmp_path)
    assert second.status == 0, second.err
    going_on = json.loads((run / "run.json").read_text())
    assert [len(record.get("resumed", [])) for record in (started, going_on)] == [0, 1]
    assert all(going_on[name] == started[name] for name in ("command", "commit", "started"))
    assert "max_epochs 2" in going_on["resumed"][0]["command"]
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["0.0", "1.0"]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert {path.name for path in (run / "lightning_logs").iterdir()} == {"version_0", "version_1"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_other_optimizer_settings_are_refused_on_resume(run, etflight_command):
    argv = ["--name", "first", "--ckpt_path", "last", "--model.optimizer.lr", 0.5, "--trainer.max_epochs", 2]
    result = etflight_command("fit", *DIGITS, *argv, cwd=run[0])
    assert result.status == 1
    assert "--model.optimizer differs" in result.error_lines[0]


@pytest.fixture
def parsed(capsys, monkeypatch, tmp_path):
    """`parsed(*argv)`: the configuration that a command line stands for, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def parse(*argv):
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, argv), "--print_config"])
        assert not stopped.value.code
        return yaml.safe_load(capsys.readouterr().out)

    return parse


def test_command_line_beats_config_beats_checkpoint(parsed, tmp_path):
    model = Classifier(10, "resnet20_cifar", loss=partial(DotRegressionLoss, exponent=0.75), in_chans=1)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "c.ckpt")
    loss = {"class_path": "DotRegressionLoss", "init_args": {"exponent": 0.5}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"model": {"loss": loss}}))
    base = ["validate", "--data", "Digits", "--ckpt_path", "c.ckpt"]
    for argv, exponent in (
        ([], 0.75),
        (["-c", "c.yaml"], 0.5),
        (["-c", "c.yaml", "--model.loss.exponent", 0.25], 0.25),
        (["--model.loss.exponent", 0.25, "-c", "c.yaml"], 0.25),
    ):
        found = parsed(*base, *argv)["model"]
        assert found["loss"]["init_args"]["exponent"] == exponent
        assert found["backbone"] == "resnet20_cifar"


def test_configuration_files_compose_and_the_later_wins(parsed):
    files = [ROOT / "configs" / name for name in ("data/cifar10_lt.yaml", "arms/etf_dr.yaml", "trainer/ddp.yaml")]
    config = parsed("fit", *(word for file in files for word in ("-c", file)))
    assert (config["trainer"]["strategy"], config["trainer"]["max_epochs"]) == ("ddp", 200)
    assert config["data"]["init_args"]["imbalance_ratio"] == 100
    assert config["model"]["loss"]["class_path"].endswith("DotRegressionLoss")


def test_short_flags_name_every_part(parsed):
    model = parsed(
        "fit", "--data", "Digits", "--model.backbone", "resnet18", "--model.head", "LinearHead", "--model.loss", "CrossEntropyLoss",
        "--model.optimizer", "AdamW", "--model.lr_scheduler", "CosineAnnealingLR", "--model.lr_scheduler.T_max", 5,
    )["model"]  # fmt: skip
    assert model["head"]["class_path"] == "etflight.LinearHead"
    assert model["loss"]["class_path"] == "etflight.CrossEntropyLoss"
    assert model["optimizer"]["class_path"] == "torch.optim.AdamW"


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        *(("head", name) for name in ("ETFHead", "LinearHead", "CosineHead")),
        *(("loss", f"{name}Loss") for name in ("CrossEntropy", "DotRegression", "Focal", "LDAM", "LogitAdjusted", "LabelAwareSmoothing")),
    ],
)  # fmt: skip
def test_choosing_a_class_by_name_gives_its_own_defaults(argument, name, parsed):
    found = parsed("fit", "-c", ROOT / "configs/arms/etf_ce.yaml", "--data", "Digits", f"--model.{argument}", name)[
        "model"
    ]
    parameters = inspect.signature(getattr(etflight, name)).parameters.items()
    defaults = {key: parameter.default for key, parameter in parameters if parameter.default is not parameter.empty}
    if name == "ETFHead":
        defaults["scale"] = 16.0  # the same class: the configuration's argument stays
    assert found[argument] == {"class_path": f"etflight.{name}", "init_args": defaults}


MY_HEAD = """
from etflight import LinearHead

class MyHead(LinearHead):
    def __init__(self, in_features, num_classes, *, sharpness: float = 2.0):
        super().__init__(in_features, num_classes)
        self.sharpness = sharpness

    def forward(self, features):
        return super().forward(features) * self.sharpness
"""


def test_a_users_own_head_in_the_current_folder_trains_and_tests(etflight_command, tmp_path):
    (tmp_path / "my_heads.py").write_text(MY_HEAD)
    head = ["--model.head", "my_heads.MyHead"]
    loss = ["--model.loss", "CrossEntropyLoss"]
    result = etflight_command(
        "fit", *DIGITS, *head, "--model.head.sharpness", 3.0, *loss, "--name", "mine", cwd=tmp_path
    )
    assert result.status == 0, result.err
    checkpoint = tmp_path / "runs/mine/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["head"]["init_args"] == {"sharpness": 3.0}
    test = ["test", "--data", "Digits", "--ckpt_path", checkpoint, *QUICK[2:]]
    unnamed = etflight_command(*test, cwd=tmp_path)
    assert unnamed.status == 1
    assert "--model.head my_heads.MyHead" in unnamed.error_lines[0]
    named = etflight_command(*test, *head, cwd=tmp_path)
    assert named.status == 0, named.err
