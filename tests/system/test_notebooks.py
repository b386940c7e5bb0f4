"""The notebooks run as they stand, but for the sizes in their parameters cell; what is committed is fit to be read by anybody."""

import ast
import json
import math
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest

from notebooks.execute import execute, tidy

FOLDER = Path(__file__).parents[2] / "notebooks"
LARGEST = 500_000  # bytes
ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[\w.+-]+/)+[\w.+-]*|\b[A-Za-z]:\\")


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", 4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def names_set_by(source):
    targets = [target for node in ast.parse(source).body for target in node.targets]
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def outcome(name, folder, sizes, expression):
    """Run a notebook with other sizes and give the value of an expression at its end, through JSON."""
    notebook = read(name)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert parameters is code_cells(notebook)[0]
    assert names_set_by(parameters.source) == set(sizes)
    parameters.source = "\n".join(f"{key} = {value!r}" for key, value in sizes.items())
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json\nprint(json.dumps({expression}))"))
    execute(notebook, folder)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    return json.loads(notebook.cells[-1].outputs[0].text)


def test_geometry_draws_the_simplex_and_codes_as_good_as_can_be(tmp_path):
    sizes = {"num_classes": 5, "feature_dim": 8, "noises": [0.0, 1.0], "draws": 2, "codes": [(12, 3), (5, 3)]}
    expression = "[gram.tolist(), list(largest.values()), list(scores.values())]"
    gram, largest, scores = outcome("geometry", tmp_path, sizes, expression)
    np.testing.assert_allclose(gram, 1.25 * np.eye(5) - 0.25, atol=1e-6)
    assert largest == pytest.approx([1 / math.sqrt(5), 0.0], abs=1e-3)
    for clean, noisy in scores:
        assert noisy < clean == pytest.approx(1.0, abs=1e-5)


def test_watching_collapse_measures_every_epoch(tmp_path):
    sizes = {"epochs": 2, "backbone": "resnet20_cifar", "classes": [1, 2, 3], "moments": [0, 2], "seed": 0}
    epochs, history = outcome("watching_collapse", tmp_path, sizes, "[monitor.epochs, monitor.history]")
    assert epochs == [0, 1, 2]
    for measure in ("nc1", "alignment", "nc4", "etf_distance", "cos_means"):
        train, val = (history[f"nc/{split}/{measure}"] for split in ("train", "val"))
        assert len(train) == len(val) == 3
        assert all(map(math.isfinite, train + val[1:]))
    assert history["nc/train/alignment"][-1] > history["nc/train/alignment"][0]


def test_comparing_arms_has_every_arm_over_its_seeds_and_reads_result_files(tmp_path):
    records = [
        {"dataset": "CIFAR10", "ratio": 100, "arm": arm, "seed": seed, "epochs": 3, "test/acc": 0.5 + 0.1 * seed}
        for arm in ("ce", "etf_dr") for seed in (0, 1)
    ]  # fmt: skip
    (tmp_path / "committed").mkdir()
    (tmp_path / "committed" / "some.json").write_text(json.dumps(records))
    sizes = {"epochs": 1, "seeds": [0, 3], "ratio": 30, "results": "committed"}
    row = "[s.dataset, s.ratio, a.arm, [r.seed for r in a.results], *a.stat('test/acc')]"
    tables = f"[[{row} for s in table for a in s.groups] for table in (sections, larger)]"
    trained, committed = outcome("comparing_arms", tmp_path, sizes, tables)
    arms = ("ce", "ce_balanced", "etf_dr_balanced")
    assert [row[:4] for row in trained] == [["Digits", 30, arm, [0, 3]] for arm in arms]
    assert all(0 < mean < 1 and std >= 0 and runs == 2 for *_, mean, std, runs in trained)
    assert [row[:4] for row in committed] == [["CIFAR10", 100, arm, [0, 1]] for arm in ("ce", "etf_dr")]
    assert [row[4:] for row in committed] == [pytest.approx([0.55, 0.1 / math.sqrt(2), 2])] * 2


def test_your_own_data_trains_the_same_from_python_and_the_command_line(tmp_path):
    sizes = {"epochs": 1, "largest": 20, "smallest": 4, "test_images": 3}
    expression = "[same, model.class_counts.tolist(), data.class_names, samples.tolist(), probabilities.tolist()]"
    same, counts, names, samples, probabilities = outcome("your_own_data", tmp_path, sizes, expression)
    assert same
    assert names == sorted(names)
    assert counts[names.index("zero")] == 18  # a tenth of 20 is held out
    assert counts[names.index("nine")] == 3  # and of 4, one
    assert samples == [3] * 10
    assert [sum(row) for row in probabilities] == pytest.approx([1, 1])
    assert not list(tmp_path.iterdir())


def texts(notebook):
    for cell in notebook.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            yield from (text for kind, text in output.get("data", {}).items() if kind.startswith("text"))


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_is_committed_was_run_and_is_fit_to_be_read(path):
    notebook = read(path.stem)
    nbformat.validate(notebook)
    assert path.stat().st_size < LARGEST
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output for output in outputs if "image/png" in output.get("data", {})]
    assert not [output for output in outputs if output.output_type == "error"]
    complaints = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
    assert not [line for line in complaints if line and not line.startswith("etflight: warning: ")]
    assert not [found for text in texts(notebook) for found in ABSOLUTE.findall(text)]
    before = nbformat.writes(notebook)
    tidy(notebook)
    assert nbformat.writes(notebook) == before  # nothing that changes from run to run
