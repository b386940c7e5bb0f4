"""What the pages of docs/ say exists: Python, names, measures, arms, published numbers. Sphinx finds no fault in them."""

import importlib
import json
import pkgutil
import re
from itertools import permutations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import timm
import torch
from scipy.stats import t

import etflight
from etflight.cli import OTHERS
from etflight.metrics import ClassStatistics, measures
from tests.system.test_readme import DOCS, README, blocks
from tests.training import save_pictures

ROOT = Path(__file__).parents[2]
PAGES = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in DOCS}
METHODS = "".join(text for page, text in PAGES.items() if page.startswith("methods/"))


PYTHON = {page: found for page, text in {"README.md": README, **PAGES}.items() if (found := blocks(text, "python"))}


@pytest.mark.parametrize("page", PYTHON)
def test_python_runs_as_written(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any("pretrained=True" in block for block in PYTHON[page]):
        monkeypatch.setattr(timm, "create_model", lambda name, pretrained: torch.nn.Linear(2, 2))  # no download
    names = {"__name__": page}
    for block in PYTHON[page]:
        if "etflight.load(" in block:  # the model trained before stands for that of the photographs
            names["trainer"].save_checkpoint("runs/my_photos/checkpoints/last.ckpt")
            save_pictures(tmp_path / "photos", "one.jpg", "two.jpg")
        exec(compile(block, page, "exec"), names)


def documented() -> set[str]:
    """The names that autodoc is asked for."""
    found = set()
    for page, text in PAGES.items():
        if page.startswith("api/"):
            found |= set(re.findall(r"^\.\. auto(?!module)\w+:: (\S+)", text, flags=re.MULTILINE))
            for module, members in re.findall(r"^\.\. automodule:: (\S+)\n   :members:(.*)", text, flags=re.MULTILINE):
                names = (
                    members.split(",") if members.strip() else getattr(importlib.import_module(module), "__all__", [])
                )
                found |= {f"{module}.{name.strip()}" for name in names}
    return found


def test_every_public_name_has_an_entry():
    packages = [module.name for module in pkgutil.walk_packages(etflight.__path__, "etflight.") if module.ispkg]
    modules = [importlib.import_module(name) for name in ("etflight", *packages)]
    public = {f"{module.__name__}.{name}" for module in modules for name in getattr(module, "__all__", [])}
    public -= {f"etflight.losses.{name}" for name in etflight.__all__}  # they are documented as etflight's own
    assert len(public) > 75
    assert public - {"etflight.__version__"} | {"etflight.geometry.simplex_equiangular_tight_frame"} <= documented()


def test_every_logged_measure_has_its_equation():
    statistics = ClassStatistics(num_classes=3, feature_dim=4)
    statistics.update(torch.randn(9, 4), torch.arange(9) % 3)
    logged = measures.summary(statistics.compute(), torch.randn(3, 4))
    assert not [name for name in logged if f"`{name.removesuffix('_std')}`" not in PAGES["measures.md"]]


def test_every_arm_is_one_of_the_methods():
    arms = {path.stem for path in (ROOT / "configs/arms").glob("*.yaml")}
    assert arms <= set(re.findall(r"`(\w+)`", METHODS))


def test_configurations_are_listed():
    listed = PAGES["command_line.md"]
    for folder in ("data", "protocols", "trainer", "logger"):
        row = next(line for line in listed.splitlines() if line.startswith(f"| `{folder}/`"))
        assert set(re.findall(r"`(\w+)`", row)) == {path.stem for path in (ROOT / "configs" / folder).glob("*.yaml")}


@pytest.mark.parametrize("command", OTHERS)
def test_every_option_of_our_own_commands_is_told(command, etflight_command, tmp_path):
    options = set(re.findall(r"--[a-z][\w.-]*\w", etflight_command.succeed(command, "--help", cwd=tmp_path).out))
    assert "--help" in options
    options = {option for option in options if not option.endswith(".help")}
    told = "".join(PAGES.values())
    assert not [option for option in options if not re.search(rf"{re.escape(option)}(?![\w.-]*\w)", told)]


@pytest.mark.parametrize(
    "file", ["docs/results.md", "docs/start.md", "docs/how_to/index.md", "configs/data/digits.yaml", "Makefile"]
)
def test_a_run_on_the_digits_takes_the_same_time_wherever_it_is_told(file):
    seconds = [run["seconds"] for run in records("digits")]
    assert f"{min(seconds):.0f} seconds to {max(seconds) / 60:.0f} minutes" in (ROOT / file).read_text()


# the column of each set in docs/methods/published.md, and its imbalance ratio where the set itself has one
LONG_TAILED = {
    "ImageNetLT": ("ImageNet-LT", 256),
    "INaturalist2018": ("iNaturalist 2018", 500),
    "PlacesLT": ("Places-LT", 996),
}


def cells_of(table: str) -> list[list[str]]:
    """The cells of the table that a text begins with, the header's first, without the line below it."""
    lines = table.split("\n\n", 1)[0].splitlines()
    header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [header, *rows]


def test_published_numbers_are_those_of_the_package():
    page = PAGES["methods/published.md"].split("## What they compare")[0]
    shown = set()
    for header, *rows in map(cells_of, page.split("\n\n|")[1:]):
        for row in rows:
            shown |= {(*row[:6], row[-1], column, cell) for column, cell in zip(header[6:-1], row[6:-1], strict=True)}
    recorded = set()
    for record in json.loads((ROOT / "etflight/reporting/published.json").read_text()):
        params = "–" if record["params"] is None else f"{record['params'] / 1e6:.2f}"
        facts = [params, *("–" if record[name] is None else record[name] for name in ("epochs", "views", "selection"))]
        column, ratio = LONG_TAILED.get(record["dataset"], (None, record["ratio"]))
        assert ratio == record["ratio"]
        cell = f"{100 * record['test/acc']:.2f}".removesuffix("0")
        cifar = f"{record['dataset'].replace('R1', 'R-1')}, ratio {ratio}"
        recorded.add(
            (*map(str, (record["method"], record["backbone"], *facts)), record["read_in"], column or cifar, cell)
        )
    assert {cell for cell in shown if cell[-1] != "–"} == recorded
    assert {column for column, _ in LONG_TAILED.values()} <= {cell[-2] for cell in recorded}


RECORDED = {"Digits": "digits", "Fashion-MNIST": "fashion_mnist_lt", "CIFAR-10": "cifar10_lt_short"} | {
    "The published schedule": "cifar10_lt",
    "The strong recipe in 200 epochs": "cifar10_lt",
    "Traffic signs from ImageNet weights": "gtsrb_lite0",
    "More classes than a simplex has room for": "omniglot",
}
COLUMNS = {"accuracy": "acc", "mean of classes": "acc_macro", "worst class": "acc_worst", "raw ECE": "ece"} | {
    "ECE": "ece_calibrated",
    **{group: f"acc_{group}" for group in ("many", "medium", "few", "head", "middle", "tail")},
}


def records(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / f"notebooks/results/{name}.json").read_text())


def table_under(heading: str, page: str) -> list[list[str]]:
    """Those of the first table under a heading."""
    return cells_of(PAGES[page].split(f"# {heading}\n", 1)[1].split("\n\n|", 1)[1])


@pytest.mark.parametrize("heading", RECORDED)
def test_results_are_those_of_the_records(heading):
    header, *rows = table_under(heading, "results.md")
    checked = 0
    for row in rows:
        arm = re.match(r"`(\w+)`", row[0])
        runs = [run for run in records(RECORDED[heading]) if arm and run["arm"] == arm[1]]
        if "seeds" in header and row[header.index("seeds")].count(",") + 1 != len(runs):
            continue  # a variant without a record of its own
        for name, cell in zip(header, row, strict=True):
            if (key := COLUMNS.get(name.partition(" (")[0])) and runs:
                values = [100 * run[f"test/{key}"] for run in runs]
                deviation = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
                assert cell == f"{fmean(values):.1f}{deviation}", (row[0], name)
                checked += 1
    assert checked >= 10


def test_the_search_is_told_as_its_log_has_it():
    """With every candidate, those that lost too."""
    log = json.loads((ROOT / "notebooks/evaluations/search_recipe.json").read_text())
    keys = [f"val/{key}" for key in ("acc", "acc_head", "acc_middle", "acc_tail", "ece")]
    kept = {
        (
            run["candidate"],
            (re.findall(r"max_epochs (\d+)", run["command"]) or [str(run["epochs"])])[0],
            *(f"{100 * run[key]:.1f}" for key in keys),
            f"{run['nc/train/alignment']:.2f}",
        )
        for run in log
    }
    _, *rows = table_under("The strong recipe, searched", "results.md")
    assert {tuple(cell.replace("`", "") for cell in row) for row in rows} == kept
    text = (ROOT / "docs/results.md").read_text()
    adjusted = [run for run in log if "adjusted" in run]
    assert len(adjusted) > 3
    for run in adjusted:
        cells = [f"{100 * accuracies[0]:.1f}" for accuracies in run["adjusted"].values()]
        assert f"{run['candidate']} | {' | '.join(cells)} |" in re.sub(r"[`*]", "", text), run["candidate"]


def test_expected_measures_are_those_of_the_records():
    sets = {"digits": "digits", "Fashion-MNIST": "fashion_mnist_lt", "CIFAR-10": "cifar10_lt_short"}
    _, *rows = table_under("What to expect at the end", "concepts/reading.md")
    for what, *cells in rows:
        arm = re.search(r"`(\w+)`", what)[1]
        runs = [run for run in records(sets[re.match(r"[\w-]+", what)[0]]) if run["arm"] == arm]
        for key, cell in zip(("train/nc1", "val/nc1", "train/alignment", "train/etf_distance"), cells, strict=True):
            assert float(cell) == float(f"{fmean(run[f'nc/{key}'] for run in runs):.2g}"), (what, key)


def compared() -> list[dict[str, list[float]]]:
    """Values in points of three seeds by what they are of; any two in one dict may be compared."""
    found = []
    for path in (ROOT / "notebooks/results").glob("*.json"):
        runs = sorted(json.loads(path.read_text()), key=lambda run: run["seed"])
        for metric in {name for run in runs for name in run if name.startswith("test/")}:
            arms: dict[str, list[float]] = {}
            for run in runs:
                if metric in run:
                    arms.setdefault(run["arm"], []).append(100 * run[metric])
            found.append(arms)
    measured = json.loads((ROOT / "notebooks/evaluations/when_to_fix.json").read_text())
    kinds = {
        "labels": (("set",), ("arm",), ("acc",)),
        "new_classes": (("set",), ("arm", "method"), ("acc", "acc_new")),
        "unknown_classes": (("known", "unknown"), ("arm", "score"), ("auroc",)),
        "shared_space": (("set", "images"), ("arm", "space"), ("recall_at_1",)),
    }
    for part, (place, name, keys) in kinds.items():
        for key in keys:
            places: dict[tuple[str, ...], dict[str, list[float]]] = {}
            for row in measured[part]:
                if key in row:
                    values = row[key]["values"] if part != "shared_space" else both_ways(row[key]["across"]["values"])
                    places.setdefault(tuple(row[k] for k in place), {})[" ".join(row[k] for k in name)] = values
            found += places.values()
    return found


def both_ways(values: list[float]) -> list[float]:
    """From one model to another (0 to 1, 0 to 2, 1 to 0, …): the means over both directions of each pair."""
    return [fmean(values[i] for i in pair) for pair in ((0, 2), (1, 4), (3, 5))] if len(values) == 6 else []


def test_every_paired_difference_is_that_of_two_arms_of_the_records():
    known = set()
    for values in compared():
        for one, other in permutations([three for three in values.values() if len(three) == 3], 2):
            pairs = [a - b for a, b in zip(one, other, strict=True)]
            half = t.ppf(0.975, 2) * stdev(pairs) / 3**0.5
            known.add(f"{fmean(pairs):+.1f} ({fmean(pairs) - half:+.1f} … {fmean(pairs) + half:+.1f})")
    said = re.findall(r"[+-][\d.]+ \([+-][\d.]+ … [+-][\d.]+\)", README + "".join(PAGES.values()))
    assert len(said) > 80
    assert [text for text in said if text not in known] == []
