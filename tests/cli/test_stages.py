import inspect
import json
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

import etflight
from etflight import Classifier, DotRegressionLoss
from etflight.cli.argv import EarlyOptions
from etflight.cli.describe import describe
from etflight.cli.place import Place
from etflight.cli.stages import main
from etflight.data import Digits
from etflight.runs.record import config_sha256, training_facts
from tests.training import DIGITS, QUIET, read_csv, save_arrays

ROOT = Path(__file__).parents[2]
ONE_BATCH = ["--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1]


@pytest.fixture(scope="module")
def run(etflight_command, tmp_path_factory):
    """A finished run of one epoch: the folder it was started in, and its run folder."""
    cwd = tmp_path_factory.mktemp("cwd")
    etflight_command.succeed("fit", *DIGITS, "--name", "first", cwd=cwd)
    return cwd, cwd / "runs" / "first"


def test_a_run_leaves_its_folder_and_nothing_else(run):
    cwd, folder = run
    assert {p.name for p in folder.iterdir()} >= {"config.yaml", "run.json", "metrics.csv", "checkpoints"}
    assert {p.name for p in cwd.iterdir()} == {"runs"}
    record = json.loads((folder / "run.json").read_text())
    assert record["seed"] == 0
    assert sum(record["data"]["class_counts"]) == 431
    assert record["data"]["validation"] == "the test set, watched only"
    rows = read_csv(folder / "metrics.csv")
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
    for wrapped in (False, True):
        sets = ({"class_path": "CIFAR10", "init_args": {"download": download}} for download in (False, True))
        data = ({"class_path": "ClassSubset", "init_args": {"images": s}} if wrapped else s for s in sets)
        here, downloaded = (config_sha256(config | {"data": one}) for one in data)
        assert here == downloaded != record["config_sha256"]
    assert shlex.split(record["command"]) == ["etflight", "fit", *map(str, DIGITS), "--name", "first"]
    assert record["data"]["imbalance_ratio"] == 20
    assert record["hardware"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("options", "asked", "found"),
    [
        ({"imbalance_ratio": 20}, 20, 21.33),
        ({"imbalance_ratio": 20, "profile": "none"}, None, 1.073),  # as the set is: 133 to 124 images a class
        ({"profile": [100] * 5 + [25] * 5}, None, 4),
    ],
)
def test_the_ratio_asked_for_and_that_of_the_images_have_one_name_each_wherever_they_are_written(options, asked, found):
    data = Digits(**options)
    for record in (training_facts(seed=0, data=data)["data"], describe(data)):
        assert (record["imbalance_ratio"], record["count_ratio"]) == (asked, found)


def test_a_training_from_the_configuration_of_another_run_is_of_its_arm(tmp_path):
    file, more, other = tmp_path / "config.yaml", tmp_path / "no_mixup.yaml", tmp_path / "arms/crt.yaml"
    other.parent.mkdir()
    other.write_text("{}")
    (tmp_path / "run.json").write_text('{"arm": "ce"}')
    file.write_text("name: digits/ce")
    more.write_text("{}")
    for files, arm in (([file], "ce"), ([file, more], "ce_no_mixup"), ([more], "no_mixup"), ([file, other], "crt")):
        options = EarlyOptions.of("etflight fit", list(map(str, files)), ["--name", "again"])
        assert Place.of("fit", options).arm == arm


def test_a_run_below_the_folder_above_can_be_read_again_with_lightnings_checkpoints(etflight_command, tmp_path):
    here, root = tmp_path / "here", ["--trainer.default_root_dir", "../out"]
    here.mkdir()
    fit = ["fit", *DIGITS, *ONE_BATCH, *root, "--trainer.callbacks+", "ModelCheckpoint", "--name", "r"]
    etflight_command.succeed(*fit, cwd=here)
    etflight_command.succeed("test", *DIGITS, "--ckpt_path", "../out/r/checkpoints/last.ckpt", cwd=here)
    assert (tmp_path / "out/r/test_metrics.json").is_file()


def test_the_rate_of_each_epoch_is_logged(etflight_command, tmp_path):
    schedule = ["--model.optimizer.lr", 0.4, "--model.lr_scheduler", "torch.optim.lr_scheduler.ExponentialLR"]
    schedule += ["--model.lr_scheduler.gamma", 0.5, "--trainer.max_epochs", 3]
    etflight_command.succeed("fit", *DIGITS, *schedule, *ONE_BATCH, "--name", "r", cwd=tmp_path)
    rows = read_csv(tmp_path / "runs/r/metrics.csv")
    assert [float(row["train/lr"]) for row in rows if row["train/lr"]] == pytest.approx([0.4, 0.2, 0.1])


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


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_results_of_the_checkpoint_alone_go_to_its_run(stage, run, etflight_command, tmp_path):
    checkpoint = run[1] / "checkpoints" / "last.ckpt"
    (run[1] / "predictions.csv").unlink(missing_ok=True)
    result = etflight_command.succeed(stage, "--data", "Digits", "--ckpt_path", checkpoint, *QUIET, cwd=tmp_path)
    table = read_csv(run[1] / {"test": "per_class.csv", "predict": "predictions.csv"}[stage])
    assert len(table) == {"test": 10, "predict": 500}[stage]
    assert result.out.count("Test: 500 images of 10 classes") == (stage == "test")
    assert "test/acc" not in result.out  # Lightning's own table
    assert list(tmp_path.iterdir()) == []


def test_predictions_in_the_run_folder_stay_as_they_are(run, etflight_command, tmp_path):
    kept = run[1] / "predictions.csv"
    kept.write_text("mine\n")
    argv = ["predict", "--data", "Digits", "--ckpt_path", run[1] / "checkpoints" / "last.ckpt", *QUIET]
    etflight_command(*argv, cwd=tmp_path).assert_refused("predictions.csv exists already", "--output")
    assert kept.read_text() == "mine\n"
    etflight_command.succeed(*argv, "--output", "other.csv", cwd=tmp_path)
    assert len(read_csv(tmp_path / "other.csv")) == 500
    kept.unlink()


def test_results_go_to_the_run_of_the_checkpoint_whatever_the_configuration_is_called(run, etflight_command, tmp_path):
    checkpoint = run[1] / "checkpoints" / "last.ckpt"
    files = ["-c", ROOT / "configs/data/digits.yaml", "-c", ROOT / "configs/arms/etf_dr.yaml"]
    argv = ["test", *files, "--ckpt_path", checkpoint, *QUIET]
    (run[1] / "test_metrics.json").unlink(missing_ok=True)
    etflight_command.succeed(*argv, cwd=tmp_path)
    assert (run[1] / "test_metrics.json").is_file()
    assert list(tmp_path.iterdir()) == []
    elsewhere = ["--model.loss.exponent", 0.25, "--name", "elsewhere", "--verbose", "false"]
    named = etflight_command.succeed(*argv, *elsewhere, cwd=tmp_path)
    assert "Test: 500 images" not in named.out
    assert (tmp_path / "runs/elsewhere/test_metrics.json").is_file()
    config = yaml.safe_load((tmp_path / "runs/elsewhere/config.yaml").read_text())
    assert config["model"]["loss"]["init_args"]["exponent"] == 0.25  # the checkpoint says 1


def test_a_folder_with_a_checkpoint_is_refused_and_untouched(run, etflight_command):
    cwd, folder = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    etflight_command("fit", *DIGITS, "--name", "first", cwd=cwd).assert_refused("--ckpt_path last")
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_results_of_another_set_do_not_go_into_the_run(run, etflight_command, tmp_path):
    save_arrays(tmp_path / "noise.npz")
    words = [
        "test",
        "--data",
        "ArrayImages",
        "--data.path",
        tmp_path / "noise.npz",
        "--ckpt_path",
        run[1] / "checkpoints/last.ckpt",
    ]
    etflight_command(*words, *QUIET, cwd=run[0]).assert_refused(
        "is not the set that", "runs/first", "give the images as in training"
    )
    etflight_command.succeed(*words, *QUIET, "--name", "noise", cwd=run[0])
    assert (run[0] / "runs/noise/test_metrics.json").is_file()


def test_results_of_another_checkpoint_are_not_replaced(run, etflight_command, tmp_path):
    shutil.copy(run[1] / "checkpoints/last.ckpt", tmp_path / "other.ckpt")
    words = [
        "test",
        "--data",
        "Digits",
        "--data.imbalance_ratio",
        20,
        "--post_hoc",
        "NearestClassMean",
        "--name",
        "ncm",
        *QUIET,
    ]
    for _ in range(2):  # the same again is replaced
        etflight_command.succeed(*words, "--ckpt_path", run[1] / "checkpoints/last.ckpt", cwd=run[0])
    refused = etflight_command(*words, "--ckpt_path", tmp_path / "other.ckpt", cwd=run[0])
    refused.assert_refused("runs/ncm", "has the results of another checkpoint", "give a new --name")
    adjusted = [
        *(word for word in words if word not in ("--post_hoc", "NearestClassMean")),
        "--model.logit_adjustment",
        1,
    ]
    etflight_command(*adjusted, "--ckpt_path", run[1] / "checkpoints/last.ckpt", cwd=run[0]).assert_refused(
        "has the results of a test that decides otherwise (NearestClassMean, additive logit adjustment with τ 0)"
    )
    etflight_command("fit", *DIGITS, "--name", "ncm", cwd=run[0]).assert_refused(
        "runs/ncm", "has the results of a test but no checkpoint"
    )


def test_results_of_an_earlier_epoch_do_not_pass_for_those_of_the_last(run, etflight_command, tmp_path):
    training = shutil.copytree(run[1], tmp_path / "runs/first")
    earlier = shutil.copy(training / "checkpoints/last.ckpt", training / "checkpoints/epoch=0-step=1.ckpt")
    words = ["test", "--data", "Digits", "--data.imbalance_ratio", 20, "--ckpt_path", earlier, *QUIET]
    before = {p: p.stat().st_mtime_ns for p in training.rglob("*")}
    refused = etflight_command(*words, cwd=tmp_path)
    refused.assert_refused(
        "epoch=0-step=1.ckpt is not the last checkpoint of run folder", "give its own results a --name"
    )
    assert {p: p.stat().st_mtime_ns for p in training.rglob("*")} == before
    etflight_command.succeed(*words, "--name", "earlier", cwd=tmp_path)
    record = json.loads((tmp_path / "runs/earlier/run.json").read_text())
    assert record["checkpoint"] == str(earlier)


def test_last_resumes_this_run_and_continues_its_metrics(etflight_command, tmp_path):
    """The logger is one that asks for a folder, which it gets in that of the run."""
    fit = ["fit", *DIGITS, *ONE_BATCH, "--trainer.logger", "TensorBoardLogger", "--name", "r", "--ckpt_path", "last"]
    first = etflight_command.succeed(*fit, cwd=tmp_path)
    assert "starts from scratch" in first.err + first.out
    run = tmp_path / "runs/r"
    started = json.loads((run / "run.json").read_text())
    etflight_command.succeed(*fit, "--trainer.max_epochs", 2, cwd=tmp_path)
    going_on = json.loads((run / "run.json").read_text())
    assert [len(record.get("resumed", [])) for record in (started, going_on)] == [0, 1]
    assert all(going_on[name] == started[name] for name in ("command", "commit", "started"))
    assert "max_epochs 2" in going_on["resumed"][0]["command"]
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None  # so the file repeats the run
    rows = read_csv(run / "metrics.csv")
    assert [row["epoch"] for row in rows if row["train/loss"]] == ["0.0", "1.0"]
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["epoch"] == 1
    assert {path.name for path in (run / "lightning_logs").iterdir()} == {"version_0", "version_1"}
    assert {path.name for path in tmp_path.iterdir()} == {"runs"}


def test_results_of_a_checkpoint_are_removed_once_its_training_goes_on(etflight_command, tmp_path):
    constant = ["--model.lr_scheduler", "torch.optim.lr_scheduler.ConstantLR", "--model.lr_scheduler.factor", 1]
    fit = ["fit", *DIGITS, *constant, "--name", "on", "--ckpt_path", "last", "--trainer.max_epochs"]
    etflight_command(*fit, 1, cwd=tmp_path).ran()
    folder = tmp_path / "runs/on"
    test = ["test", *DIGITS, "--ckpt_path", "runs/on/checkpoints/last.ckpt"]
    etflight_command(*test, cwd=tmp_path).ran()
    results = [folder / "test_metrics.json", folder / "per_class.csv"]
    assert "nothing was left to train: epoch 1 was the last" in etflight_command(*fit, 1, cwd=tmp_path).err
    assert all(path.is_file() for path in results)
    etflight_command(*fit, 2, cwd=tmp_path).ran()
    assert not any(path.exists() for path in results)


def test_what_ended_a_training_early_is_said(etflight_command, tmp_path):
    stop = [
        "--trainer.callbacks+",
        "EarlyStopping",
        "--trainer.callbacks.monitor",
        "val/acc",
        "--trainer.callbacks.mode",
        "max",
    ]
    at_once = ["--trainer.callbacks.patience", 1, "--trainer.callbacks.min_delta", 1, "--trainer.max_epochs", 3]
    ended = etflight_command.succeed("fit", *DIGITS, *ONE_BATCH, *stop, *at_once, "--name", "r", cwd=tmp_path)
    assert "EarlyStopping ended the training after epoch 2" in ended.err
    assert "EarlyStopping will choose by them" in ended.err
    held_out = ["--data.val_fraction", 0.2, "--name", "h"]
    ended = etflight_command.succeed("fit", *DIGITS, *ONE_BATCH, *stop, *at_once, *held_out, cwd=tmp_path)
    assert "will choose by them" not in ended.err


def test_a_folder_of_somebody_elses_gets_no_results(run, etflight_command):
    folder = run[0] / "runs/mine"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: true")
    checkpoint = run[1] / "checkpoints/last.ckpt"
    refused = etflight_command("test", *DIGITS, "--name", "mine", "--ckpt_path", checkpoint, cwd=run[0])
    refused.assert_refused("runs/mine has a config.yaml but no run.json")
    assert (folder / "config.yaml").read_text() == "mine: true"


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_a_file_with_a_callback_that_saves_serves_every_stage(stage, run, etflight_command, tmp_path):
    (tmp_path / "best.yaml").write_text("trainer: {callbacks: [{class_path: ModelCheckpoint}]}")
    etflight_command(
        stage, *DIGITS, "-c", "best.yaml", "--ckpt_path", run[1] / "checkpoints/last.ckpt", "--name", "other",
        cwd=tmp_path,
    ).ran()  # fmt: skip


@pytest.mark.parametrize("option", ["--nam", "--ckpt", "--trainer.default_root"])
def test_no_option_may_be_shortened(option, etflight_command, tmp_path):
    etflight_command("fit", *DIGITS, option, "x", cwd=tmp_path).assert_refused(option)
    assert not (tmp_path / "runs").exists()


def test_other_optimizer_settings_are_refused_on_resume(run, etflight_command):
    argv = ["--name", "first", "--ckpt_path", "last", "--model.optimizer.lr", 0.5, "--trainer.max_epochs", 2]
    etflight_command("fit", *DIGITS, *argv, cwd=run[0]).assert_refused("--model.optimizer differs")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (["--model.loss", "FocalLoss"], "--model.loss differs"),
        (["--model.loss.class_balance", "global"], "--model.loss differs"),
        (["--model.center_pull", 0.1], "--model.center_pull differs"),
        (["--data.mixup", 0.2], "the mixup 0.0, not 0.2: give the same --data options"),
        (["--data.sampler", "balanced"], "the sampler instance, not balanced"),
    ],
)
def test_a_step_of_another_kind_is_refused_on_resume_and_the_run_keeps_its_files(other, words, run, etflight_command):
    before = {path: path.read_bytes() for path in run[1].rglob("*") if path.is_file()}
    argv = ["--name", "first", "--ckpt_path", "last", *other]
    etflight_command("fit", *DIGITS, *argv, cwd=run[0]).assert_refused(words)
    assert {path: path.read_bytes() for path in run[1].rglob("*") if path.is_file()} == before


def test_a_run_in_the_place_of_its_files_is_told_how_to_name_them(run, etflight_command):
    test, named = ["test", *QUIET], "-c runs/first/config.yaml --ckpt_path runs/first/checkpoints/last.ckpt"
    for words in (
        ["runs/first"],
        ["--data", "Digits", "--ckpt_path", "runs/first/checkpoints/last.ckpt", "runs/first"],
    ):
        refused = etflight_command(*test, *words, cwd=run[0])
        refused.assert_refused(f"; for this run give {named}")
    etflight_command.succeed(*test, *named.split(), cwd=run[0])


def test_the_same_settings_in_other_words_go_on(run, etflight_command, tmp_path):
    shutil.copytree(run[1], tmp_path / "runs/first")
    same = [
        "--data.sampler",
        "instance",
        "--model.loss",
        '{"class_path": "etflight.DotRegressionLoss"}',
        "--model.sam_rho",
        0,
    ]
    result = etflight_command("fit", *DIGITS, "--name", "first", "--ckpt_path", "last", *same, cwd=tmp_path).ran()
    assert "nothing was left to train" in result.err


def test_weights_of_another_architecture_are_told_by_the_option(run, etflight_command):
    words = ["test", *DIGITS, "--ckpt_path", run[1] / "checkpoints/last.ckpt", "--model.backbone", "resnet32_cifar"]
    etflight_command(*words, cwd=run[0]).assert_refused("of another model: other than --model.backbone says")


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


@pytest.mark.parametrize(("head", "loss"), [("ETFHead", "LDAMLoss"), ("CosineHead", "FocalLoss")])
def test_choosing_a_class_by_name_gives_its_own_defaults(head, loss, parsed):
    files = ["-c", ROOT / "configs/arms/etf_ce.yaml", "-c", ROOT / "configs/data/digits.yaml"]
    short = ["--model.head", head, "--model.loss", loss, "--model.optimizer", "AdamW"]
    found = parsed("fit", *files, *short)["model"]
    for argument, name in (("head", head), ("loss", loss)):
        parameters = inspect.signature(getattr(etflight, name)).parameters.items()
        defaults = {key: parameter.default for key, parameter in parameters if parameter.default is not parameter.empty}
        if name == "ETFHead":
            defaults["scale"] = 16.0  # the same class: the configuration's argument stays
        assert found[argument] == {"class_path": f"etflight.{name}", "init_args": defaults}
    assert found["optimizer"]["class_path"] == "torch.optim.AdamW"
    rates = {name: found["optimizer"]["init_args"][name] for name in ("lr", "weight_decay")}
    assert rates == {"lr": 0.001, "weight_decay": 0.01}


def test_another_optimizer_keeps_what_was_given_and_nothing_of_the_default_one(parsed):
    found = parsed("fit", "--data", "Digits", "--model.optimizer.lr", 0.02, "--model.optimizer", "AdamW")
    arguments = found["model"]["optimizer"]["init_args"]
    assert {name: arguments[name] for name in ("lr", "weight_decay")} == {"lr": 0.02, "weight_decay": 0.01}


def test_the_default_optimizer_named_again_keeps_what_was_not_given(parsed):
    spec = '{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.2}}'
    found = parsed("fit", "--data", "Digits", "--model.optimizer", spec)["model"]["optimizer"]["init_args"]
    assert (found["lr"], found["momentum"], found["weight_decay"]) == (0.2, 0.9, 2e-4)


def test_an_optimizer_named_in_one_file_and_changed_in_another_has_its_own_defaults(parsed, tmp_path, monkeypatch):
    (tmp_path / "my_optimizers.py").write_text("import torch\n\nclass SGD(torch.optim.AdamW):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.yaml").write_text("model: {optimizer: {class_path: my_optimizers.SGD}}")
    (tmp_path / "b.yaml").write_text("model: {optimizer: {init_args: {lr: 0.0005}}}")
    found = parsed("fit", "--data", "Digits", "-c", "a.yaml", "-c", "b.yaml")["model"]["optimizer"]
    arguments = found["init_args"]
    assert (found["class_path"], arguments["lr"], arguments["weight_decay"]) == ("my_optimizers.SGD", 0.0005, 0.01)


MY_HEAD = """
from etflight import LinearHead

class MyHead(LinearHead):
    def __init__(self, in_features, num_classes, *, sharpness: float = 2.0):
        super().__init__(in_features, num_classes)
        self.sharpness = sharpness

    def logits(self, embedding):
        return super().logits(embedding) * self.sharpness
"""


def test_a_users_own_head_in_the_current_folder_trains_and_tests(etflight_command, tmp_path):
    (tmp_path / "my_heads.py").write_text(MY_HEAD)
    head = ["--model.head", "my_heads.MyHead"]
    own = ["--model.head.sharpness", 3.0, "--model.loss", "CrossEntropyLoss", "--name", "mine"]
    etflight_command.succeed("fit", *DIGITS, *head, *own, cwd=tmp_path)
    checkpoint = tmp_path / "runs/mine/checkpoints/last.ckpt"
    assert torch.load(checkpoint, weights_only=True)["hyper_parameters"]["head"]["init_args"] == {"sharpness": 3.0}
    test = ["test", "--data", "Digits", "--ckpt_path", checkpoint, *QUIET]
    etflight_command(*test, cwd=tmp_path).assert_refused("--model.head my_heads.MyHead")
    etflight_command.succeed(*test, *head, cwd=tmp_path)
