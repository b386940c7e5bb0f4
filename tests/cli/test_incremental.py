import json
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from etflight import Classifier
from etflight.analysis.incremental import refuse_empty_classes
from etflight.backbones.cifar import CifarNet
from etflight.cli import incremental
from etflight.data import ClassSubset, Digits
from etflight.utils.errors import UserError
from tests.training import QUIET, seen, written

FRAME = ["--model.head", "ETFHead", "--model.head.projection_dim", 16, "--model.head.reserved_classes", 4]
COSINE = ["--model.head", "CosineHead", "--model.loss", "CrossEntropyLoss"]
ORDER = [2, 0, 5, 7, 1, 9, 3, 4, 6, 8]  # the classes of the base session, as given, then the others
SESSIONS = ["--way", "2", "--shots", "5", "--steps", "5", "--accelerator", "cpu"]


def stage(argv):
    from etflight.cli.stages import main  # here, since processes that train nothing import this file, too

    main(argv)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def fit(root, name, *words):
    data = ["--data", "ClassSubset", "--data.images", "Digits", "--data.classes", "2,0,5,7,1,9", "--data.max_count", 40]
    place = ["--trainer.default_root_dir", root, "--name", name, "--trainer.max_epochs", 1, "--monitor", "null"]
    stage(["fit", *map(str, [*data, "--model.backbone", "resnet20_cifar", *words, *QUIET, *place])])
    return root / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {"frame": fit(root, "frame", *FRAME), "cosine": fit(root, "cosine", *COSINE)}


def learn(run, *words):
    """What the command prints."""
    with redirect_stdout(StringIO()) as out:
        incremental.main([str(run), *SESSIONS, *map(str, words)])
    return out.getvalue()


@pytest.fixture(scope="module")
def printed(runs):
    return learn(runs["frame"])


@pytest.fixture(scope="module")
def folder(runs, printed):
    return runs["frame"] / "incremental/frame_2way_5shot_seed0"


def test_results_of_each_session_are_printed_and_written_with_states_and_a_figure(folder, printed):
    names = {"incremental.json", "sessions.png", *(f"session_{s}.safetensors" for s in range(3))}
    assert {path.name for path in folder.iterdir()} == names
    record = json.loads((folder / "incremental.json").read_text())
    assert [row["classes"] for row in record["sessions"]] == [6, 8, 10]
    assert [row["new_classes"] for row in record["sessions"]] == [[str(k) for k in ORDER[:6]], ["3", "4"], ["6", "8"]]
    for row in record["sessions"]:
        assert f"{100 * row['acc']:.1f}" in printed
        assert row["forgetting"] == pytest.approx(record["sessions"][0]["acc_base"] - row["acc_base"])
    assert record["performance_drop"] == pytest.approx(record["sessions"][0]["acc"] - record["sessions"][2]["acc"])
    assert f"performance drop {100 * record['performance_drop']:.1f}" in printed
    assert f"{folder}: incremental.json" in printed


def test_the_base_session_is_that_of_the_run(runs, folder):
    data = ClassSubset(images=Digits(), classes="2,0,5,7,1,9")
    model = Classifier.load_from_checkpoint(runs["frame"] / "checkpoints/last.ckpt").eval()
    logits, labels = seen(data, "test", model)
    first = json.loads((folder / "incremental.json").read_text())["sessions"][0]
    assert first["acc"] == first["acc_base"] == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert first["acc_new"] is None


@pytest.mark.parametrize("run", ["frame", "cosine"])
def test_nearest_class_means_of_any_run_are_those_computed_from_scratch(runs, run, tmp_path):
    learn(runs[run], "--method", "ncm", "--output", tmp_path / "ncm")
    record = json.loads((tmp_path / "ncm/incremental.json").read_text())
    model, digits = Classifier.load_from_checkpoint(runs[run] / "checkpoints/last.ckpt").eval(), Digits()
    trained, labels = seen(ClassSubset(images=digits, classes="2,0,5,7,1,9", max_count=40), "train", model.embed)
    everything, classes = seen(digits, "train", model.embed)
    tested, right = seen(digits, "test", model.embed)
    means = [trained[labels == k].mean(0) for k in range(6)]
    for row in record["sessions"]:
        shots = np.array(row["shots"]).reshape(-1, 5)
        own = [int(name) for name in row["new_classes"]] if row["session"] else []
        for k, positions in zip(own, shots, strict=True):
            assert classes[positions].tolist() == [k] * 5
            means.append(everything[positions].mean(0))
        unit, stacked = tested / tested.norm(dim=1, keepdim=True), torch.stack(means)
        known = torch.tensor([int(k) in ORDER[: len(means)] for k in right])
        decided = (unit @ (stacked / stacked.norm(dim=1, keepdim=True)).T).argmax(1)
        hits = torch.tensor(ORDER)[decided] == right
        assert row["acc"] == pytest.approx(float(hits[known].double().mean()), abs=0.004)  # a decision may be a tie


def test_stored_features_give_the_same_sessions_and_are_not_computed_again(runs, folder, tmp_path, monkeypatch):
    features = ["--features", tmp_path / "features"]
    learn(runs["frame"], *features, "--output", tmp_path / "first")
    learn(runs["frame"], *features, "--output", tmp_path / "other_shots", "--seed", 1)
    stores = written(tmp_path / "features")
    assert len(stores) == 4
    assert {"train.safetensors", "all_classes/test.safetensors"} < stores.keys()
    monkeypatch.setattr(CifarNet, "forward", None)  # nothing may call it
    learn(runs["frame"], *features, "--output", tmp_path / "second")
    assert written(tmp_path / "features") == stores
    rows = [json.loads((place / "incremental.json").read_text())["sessions"] for place in (folder, tmp_path / "first")]
    assert [row["acc"] for row in rows[1]] == pytest.approx([row["acc"] for row in rows[0]], abs=0.004)
    again = json.loads((tmp_path / "second" / "incremental.json").read_text())["sessions"]
    assert again == rows[1]


def test_a_cosine_head_and_a_frame_learn_with_the_method_cosine(runs, tmp_path):
    for name in ("frame", "cosine"):
        learn(runs[name], "--method", "cosine", "--output", tmp_path / name)
        assert len(json.loads((tmp_path / name / "incremental.json").read_text())["sessions"]) == 3


@pytest.mark.parametrize("finished", [0, 1, 2])
def test_a_stopped_command_goes_on_after_the_last_finished_session_with_the_same_bytes(
    runs, folder, printed, finished, tmp_path
):
    (tmp_path / "again").mkdir()
    for session in range(finished + 1):
        shutil.copy(folder / f"session_{session}.safetensors", tmp_path / "again")
    written = (tmp_path / "again" / f"session_{finished}.safetensors").stat().st_mtime_ns
    table = learn(runs["frame"], "--output", tmp_path / "again")
    assert table.replace(str(tmp_path / "again"), str(folder)) == printed
    assert contents(tmp_path / "again") == contents(folder)
    assert (tmp_path / "again" / f"session_{finished}.safetensors").stat().st_mtime_ns == written


def test_the_same_command_elsewhere_leaves_the_same_bytes_and_another_seed_has_a_folder_of_its_own(
    runs, folder, printed, tmp_path
):
    learn(runs["frame"], "--output", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    learn(runs["frame"], "--seed", 1)
    other = json.loads((folder.parent / "frame_2way_5shot_seed1/incremental.json").read_text())
    mine = json.loads((folder / "incremental.json").read_text())
    assert [row["shots"] for row in other["sessions"][1:]] != [row["shots"] for row in mine["sessions"][1:]]
    assert other["sessions"][0]["acc"] == mine["sessions"][0]["acc"]


def learn_on_two(rank, run, output):
    return learn(run, "--devices", 2, "--output", output)


def test_two_processes_learn_what_one_does_byte_by_byte(runs, folder, printed, two_ready_processes, tmp_path):
    first, second = two_ready_processes(learn_on_two, [(runs["frame"], tmp_path / "two")] * 2)
    assert contents(tmp_path / "two") == contents(folder)
    assert first.replace(str(tmp_path / "two"), str(folder)) == printed
    assert second == ""


def test_sessions_of_otherwise_prepared_images_are_other_sessions(runs, folder, tmp_path):
    before = contents(folder)
    shutil.copy(folder / "session_0.safetensors", tmp_path)  # as a stopped command leaves it
    for words, message in (
        ([], "holds other results .settings preprocessing: .*give --output"),
        (["--output", tmp_path], "holds sessions with other settings .preprocessing: .*give --output for another"),
    ):
        with pytest.raises(UserError, match=message):
            learn(runs["frame"], "--data.mean=[0.9]", "--data.std=[3.0]", *words)
    assert contents(folder) == before


def test_results_of_another_method_or_of_somebody_else_stay(runs, folder, tmp_path):
    for name in ("incremental.json", "sessions.png"):  # the states have been deleted
        shutil.copy(folder / name, tmp_path / name)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds other results .settings method: frame, not ncm.*give --output"):
        learn(runs["frame"], "--method", "ncm", "--output", tmp_path)
    (tmp_path / "incremental.json").write_text("mine")
    with pytest.raises(UserError, match=r"incremental\.json holds other results"):
        learn(runs["frame"], "--output", tmp_path)
    (tmp_path / "incremental.json").unlink()
    with pytest.raises(UserError, match=r"sessions\.png has no incremental\.json beside it"):
        learn(runs["frame"], "--output", tmp_path)
    assert contents(tmp_path) == {"sessions.png": before["sessions.png"]}


def test_a_state_without_what_the_method_has_learnt_is_named(runs, folder, tmp_path):
    name = "session_0.safetensors"
    with safe_open(folder / name, "pt") as file:
        save_file({"memory": file.get_tensor("memory")}, tmp_path / name, file.metadata())
    with pytest.raises(UserError, match="state after session 0 is damaged, or of another learner"):
        learn(runs["frame"], "--output", tmp_path)


def test_a_class_without_images_is_named():
    data = ClassSubset(images=Digits(), classes="2,0,5")
    with pytest.raises(UserError, match="classes 2,0,5 of Digits: class 0 has no test image that can be read"):
        refuse_empty_classes("test", torch.tensor([0, 2, 2]), data)


def test_bad_input_is_one_line(runs, folder, tmp_path):
    save_file({"memory": torch.zeros(1)}, tmp_path / "session_0.safetensors", {"etflight": "[]"})
    for run, words, message in (
        ("frame", ["--shots", 0], "shots is 0: a session without images teaches nothing"),
        ("frame", ["--way", 3], "way is 3, which does not divide the 4 new classes: give one of 1, 2, 4"),
        ("frame", ["--shots", 500], r"class 6 \(3\) has \d+ training images, but 500 shots were asked for"),
        ("frame", ["--steps", 6], "holds other results .settings steps: 5, not 6.*give --output"),
        ("frame", ["--lr", 0], "--lr is 0.0: give a positive, finite number"),
        ("frame", ["--lr", "1e35", "--output", tmp_path / "n"], "the loss of a session became .*: give a smaller --lr"),
        ("frame", ["--method", "ncm", "--lr", 1], "--lr: method ncm trains nothing"),
        ("frame", ["--output", tmp_path], "session_0.safetensors is no state of a session, or is damaged"),
        ("frame", ["--output", Path(__file__)], "cannot be written to"),
        ("frame", ["--data", "Digits"], "decides between 6 classes, but Digits has 10"),
        ("cosine", [], "needs an ETFHead with reserved_classes, but the base session has a CosineHead"),
    ):
        with pytest.raises(UserError, match=message):
            learn(runs[run], *words)
    assert not (tmp_path / "n/session_1.safetensors").exists()


def test_a_run_on_all_classes_has_none_left(tmp_path):
    data = ["--data", "Digits", "--data.max_count", "5", "--model.backbone", "resnet20_cifar", *QUIET]
    stage(["fit", *data, "--trainer.default_root_dir", str(tmp_path), "--name", "all", "--trainer.max_epochs", "1"])
    with pytest.raises(UserError, match=r"trained on all classes of Digits, so none is left .*--data.images Digits"):
        learn(tmp_path / "all")
