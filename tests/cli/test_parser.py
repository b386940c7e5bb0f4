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
# what follows on the command line: the option that its error names, and what was meant
CASES = {
    "--model.loss LDAM": ["--model.loss:", "'LDAM'", "LDAMLoss"],
    "--model.head nowhere.Head": ["--model.head:", "'nowhere.Head'"],
    "--model.head etflight.FocalLoss": ["--model.head:", "'etflight.FocalLoss' names no Head"],
    "--model.optimizer adamw": ["--model.optimizer:", "AdamW"],
    "--trainer.callbacks Qqqq": ["--trainer.callbacks:", "'Qqqq'"],
    "--post_hoc Bogus": ["--post_hoc:", "NearestClassMean, TauNormalization"],
    "--data ImageDataModule": ["--data:", "'ImageDataModule'"],
    "--model.optimizer.lr fast": ["--model.optimizer.lr:", "float", "fast"],
    "--trainer.max_epochs x": ["--trainer.max_epochs:", "int", "got x"],
    "--data.profile [a]": ["--data.profile:", "'exp', 'step', 'none'", "['a']"],
    "--model.lr_scheduler ReduceLROnPlateau": ["--model.lr_scheduler.monitor"],
    "--trainer.callbacks+ EarlyStopping": ["--trainer.callbacks.monitor"],
    "--trainer.callbacks+ EarlyStopping --trainer.callbacks.monitor a --trainer.callbacks.patience x": ["--trainer.callbacks.patience:"],
    "--model.num_classes 7": ["model.num_classes"],
    "--model.head.bogus 1": ["--model.head.bogus:"],
    "--data.imbalance_ration 20": ["--data.imbalance_ration:", "imbalance_ratio"],
    "--monitor.every 2": ["--monitor.every:", "every_n_epochs"],
    "-c wrong.yaml": ["--data.imbalance:", "imbalance_ratio"],
    "--bogus 1": ["--bogus 1"],
    "--optimizer AdamW": ["did you mean --model.optimizer?"],
    "-c": ["-c/--config"],
    "--fine_tuning null": ["--fine_tuning:", "null"],
}  # fmt: skip


@pytest.mark.parametrize("words", CASES)
def test_a_usage_error_is_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("data: {class_path: Digits, init_args: {imbalance: 3}}")
    with pytest.raises(SystemExit) as stopped:
        main([*FIT, *words.split()])
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("etflight: error: ")
    assert line.endswith(" (see etflight fit --help)\n")
    assert line.count("\n") == 1
    assert [part for part in CASES[words] if part not in line] == []


@pytest.mark.parametrize(
    ("command", "argv", "options"),
    [
        (main, ["fit"], ["--data"]),
        (describe.main, ["--data", "ListImages"], ["--data.root", "--data.lists"]),
        (describe.main, ["--data", "Digits", "--images_per_class", "2.5"], ["--images_per_class:"]),
        (ood.main, ["runs", "--data", "Digits", "--k", "0"], ["--k:", "PositiveInt", "got 0"]),
        (export.main, ["c.ckpt"], ["output"]),
    ],
)
def test_other_commands_tell_the_option_that_is_missing_or_wrong(command, argv, options, capsys):
    with pytest.raises(SystemExit):
        command(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert [option for option in options if option not in line] == []


HELP = [(name, ["--help"]) for name in [*STAGES, *OTHERS]] + [
    ("fit", [f"--{option}.help", name])
    for option, names in (
        ("data", [name for name in data.__all__ if hasattr(getattr(data, name), "eval_dataloader")]),
        ("model.head", [name for name in etflight.__all__ if name.endswith("Head")]),
        ("model.loss", [name for name in etflight.__all__ if name.endswith("Loss")]),
        ("trainer.callbacks", [name for name in callbacks.__all__ if name != "default_callbacks"]),
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
