"""Usage errors: what may have been meant, among the names that the option takes and no others."""

from importlib import import_module
from pathlib import Path

import pytest
from torch.optim import Optimizer

import etflight.cli
from etflight.cli.parser import summarise
from etflight.data import ImageDataModule

BASES = {"data": ImageDataModule, "model.optimizer": Optimizer}


def unknown(option: str, name: str) -> str:
    message = f'Parser key "{option}":\n  - Expected a path but {name} either not accessible or invalid\n  Given value: {name}'
    return summarise(message, [f"--{option}={name}"], BASES)


def test_near_matches_are_names_that_the_option_takes():
    assert unknown("data", "CIFAR") == "--data: nothing is called 'CIFAR'; near matches: CIFAR10, CIFAR100"
    assert "Adam" in unknown("model.optimizer", "Adan")
    assert "Digits" not in unknown("model.optimizer", "Digit")


def test_without_a_near_match_all_names_are_told():
    assert {"Digits", "FolderImages"} <= set(unknown("data", "Qqqq").rpartition("there are ")[2].split(", "))


def test_an_option_of_an_unknown_kind_has_no_hint():
    assert unknown("trainer.callbacks", "Qqqq") == "--trainer.callbacks: nothing is called 'Qqqq'"


def test_none_is_called_null_as_in_a_configuration_file():
    message = (
        "Parser key \"max_epochs\":\n  - Expected a <class 'int'>\n  - Expected a <class 'NoneType'>\n  Given value: x"
    )
    assert summarise(message, ["--trainer.max_epochs=x"], {}) == "--trainer.max_epochs: Expected an int or null, got x"


def test_what_is_missing_is_told_as_the_option_that_gives_it():
    message = "the following arguments are required: root, lists"
    assert summarise(message, [], BASES) == "these arguments are required: --data.root, --data.lists"
    assert (
        summarise("the following arguments are required: output", [], BASES) == "these arguments are required: output"
    )


@pytest.mark.parametrize(("argv", "status"), [(["--help"], 0), (["-h"], 0), ([], 2), (["tset"], 2), (["--bogus"], 2)])
def test_every_command_has_a_line_in_one_table(argv, status, etflight_command, tmp_path):
    result = etflight_command(*argv, cwd=tmp_path)
    assert result.status == status
    assert len(result.error_lines) == (status != 0)
    lines = (result.err if status else result.out).splitlines()
    rows = [line.split(maxsplit=1) for line in lines if line.startswith("  ")]
    modules = {path.stem for path in Path(etflight.cli.__file__).parent.glob("*.py")}
    assert {"fit", "validate", "test", "predict", "report", "study"} < {name for name, _ in rows}
    commands = {name for name in modules if hasattr(import_module(f"etflight.cli.{name}"), "main")} - {
        "__init__",
        "stages",
    }
    assert {name for name, _ in rows} - {"fit", "validate", "test", "predict"} == commands
    assert all(what.endswith(".") for _, what in rows)


def test_what_the_data_decide_is_to_be_left_out(etflight_command, tmp_path):
    result = etflight_command("fit", "--data", "Digits", "--model.num_classes", 7, cwd=tmp_path)
    assert result.status == 2
    assert result.error_lines == [
        "etflight: error: --model.num_classes is taken from --data: leave it out (see etflight fit --help)"
    ]
