"""Usage errors: one line with the option's full name, the reason, and what may have been meant."""

import re
from importlib import import_module

import pytest

import etflight
from etflight import callbacks, data
from etflight.cli import OTHERS, STAGES, describe, export, ood
from etflight.cli.stages import main
from etflight.utils.errors import UserError

FIT = ["fit", "--data", "Digits"]
# what follows on the command line: how its error begins
CASES = {
    "--model.loss LDAM": "--model.loss: nothing is called 'LDAM'; near matches: LDAMLoss",
    "--model.head nowhere.Head": "--model.head: nothing is called 'nowhere.Head' (No module named 'nowhere'); near matches: ",
    "--model.head etflight.FocalLoss": "--model.head: etflight.FocalLoss is no Head: derive it from etflight.heads.Head (see",
    "--model.optimizer adamw": "--model.optimizer: nothing is called 'adamw'; near matches: AdamW, ",
    "--model.head ImageDataModule": "--model.head: nothing is called 'ImageDataModule'",
    "--trainer.callbacks Qqqq": "--trainer.callbacks: nothing is called 'Qqqq' (see",
    "--post_hoc Bogus": "--post_hoc: nothing is called 'Bogus'; there are ",
    "--data ImageDataModule": "--data: say which: ArrayImages, CIFAR10, ",
    "--model.optimizer.lr fast": "--model.optimizer.lr: Expected a float, got fast",
    "--trainer.max_epochs x": "--trainer.max_epochs: Expected an int or null, got x",
    "--seed_everything null": "--seed_everything: Expected a bool or an int, got null",
    "--data.profile [a]": "--data.profile: Expected one of 'exp', 'step', 'none' or an int, got ['a']",
    "--model.lr_scheduler ReduceLROnPlateau": "these arguments are required: --model.lr_scheduler.monitor",
    "--trainer.callbacks+ EarlyStopping": "these arguments are required: --trainer.callbacks.monitor",
    "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor a --trainer.callbacks.patience x":
        "--trainer.callbacks.patience: Expected an int, got x",
    "--model.num_classes 7": "--model.num_classes is taken from --data: leave it out",
    "--model.head.bogus 1": "--model.head.bogus: ETFHead takes no argument 'bogus'",
    "--model.head.num_classes 7": "--model.head.num_classes: ETFHead gets it from the data and the network: leave it out",
    "--data.imbalance_ration 20": "--data.imbalance_ration: Digits takes no argument 'imbalance_ration'; near matches: imbalance_ratio",
    "--monitor.every 2": "--monitor.every: NeuralCollapseMonitor takes no argument 'every'; near matches: every_n_epochs",
    "-c wrong.yaml": "--data.imbalance: Digits takes no argument 'imbalance'; near matches: imbalance_ratio",
    "--bogus 1": "unrecognized arguments: --bogus 1",
    "--optimizer AdamW": "unrecognized arguments: --optimizer AdamW; did you mean --model.optimizer?",
    "-c": "argument -c/--config: expected one argument",
}  # fmt: skip


@pytest.mark.parametrize("words", CASES)
def test_a_usage_error_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("data: {class_path: Digits, init_args: {imbalance: 3}}")
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, *words.split()])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"etflight: error: {CASES[words]}")
    assert line.endswith(" (see etflight fit --help)\n")
    assert line.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "argv", "line"),
    [
        (main, ["fit"], "these arguments are required: --data (see etflight fit --help)"),
        (describe.main, ["--data", "ListImages"], "these arguments are required: --data.root, --data.lists (see etflight describe"),
        (describe.main, ["--data", "Digits", "--images_per_class", "0"], "--images_per_class: Expected a positive int, got 0 (see"),
        (describe.main, ["--data", "Digits", "--images_per_class", "2.5"], "--images_per_class: Expected a positive int, got 2.5 (see"),
        (ood.main, ["runs", "--data", "Digits", "--k", "0"], "--k: Expected a positive int or null, got 0 (see"),
        (export.main, ["c.ckpt"], "these arguments are required: output (see etflight export --help)"),
    ],
)  # fmt: skip
def test_other_commands_tell_the_option_that_is_missing_or_wrong(command, argv, line, capsys):
    with pytest.raises(SystemExit):
        command(argv)
    assert capsys.readouterr().err.startswith(f"etflight: error: {line}")


HELP = [(name, ["--help"]) for name in [*STAGES, *OTHERS]] + [
    ("fit", [f"--{option}.help", name])
    for option, names in (
        ("data", [name for name in data.__all__ if hasattr(getattr(data, name), "eval_dataloader")]),
        ("model.head", [name for name in etflight.__all__ if name.endswith("Head")]),
        ("model.loss", [name for name in etflight.__all__ if name.endswith("Loss")]),
        ("trainer.callbacks", callbacks.__all__),
    )
    for name in names
]


@pytest.mark.parametrize(("command", "words"), HELP, ids=[f"{command} {' '.join(words)}" for command, words in HELP])
def test_help_shows_no_object_of_python(command, words, capsys):
    ask, argv = (
        (import_module(f"etflight.cli.{command}").main, words) if command in OTHERS else (main, [command, *words])
    )
    with pytest.raises(SystemExit) as stopped:
        ask(argv)
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--" in text
    assert not re.findall(r"<(?:function|locals|object|module|bound)\b|<lambda>|\w+Path\(|\bat 0x|functools\.", text)


@pytest.mark.parametrize(
    ("words", "section"),
    [
        ("--model own.yaml", "model"),
        ("--trainer own.yaml", "trainer"),
        ("--data own.yaml", "data"),
        ("-c outer.yaml", "model"),
    ],
)
def test_a_section_in_a_file_of_its_own_is_refused(words, section, tmp_path, monkeypatch):
    """The folder of the run and the defaults of an optimizer are found before such a file would be read."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.yaml").write_text("optimizer: AdamW")
    (tmp_path / "outer.yaml").write_text("model: own.yaml")
    with pytest.raises(UserError, match=f"--{section} own.yaml: a file has all its options below `{section}:`"):
        main([*FIT, *words.split()])
    assert {path.name for path in tmp_path.iterdir()} == {"own.yaml", "outer.yaml"}
