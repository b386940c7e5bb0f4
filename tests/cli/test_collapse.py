import json
import re
import shutil
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from etflight import Classifier, LinearHead, __main__
from etflight.backbones.cifar import CifarNet
from etflight.cli import collapse, describe
from etflight.data import Digits
from etflight.losses import CrossEntropyLoss
from etflight.utils.errors import UserError
from tests import training
from tests.metrics import oracle
from tests.metrics.oracle import assert_measures, measure

FIGURES = {f"{split}_{name}.png" for split in ("train", "test") for name in ("heat_map", "spectrum", "variability")}


def check(record: dict, features: Tensor, logits: Tensor, labels: Tensor, weight: Tensor, rel: float = 1e-6) -> None:
    accuracy = (logits.argmax(1) == labels).double().mean().item()
    assert_measures(record, {**measure(features, labels, weight)[0], "acc": accuracy}, rel)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a training on digits at ratio 20, with a normalisation of its own."""
    data = ["--data.imbalance_ratio=20", "--data.std=[0.5]", "--data.max_count=40"]
    model = ["--model.head=LinearHead", "--model.loss=CrossEntropyLoss", "--monitor=null"]
    return training.fit_digits(tmp_path_factory.mktemp("runs"), *data, *model, "--trainer.max_epochs=1")


@pytest.fixture(scope="module")
def last(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of noise, 32 x 32 in colour, as an .npz file."""
    path = tmp_path_factory.mktemp("images") / "images.npz"
    training.save_arrays(path, test=15, shape=(32, 32, 3), classes=3)
    return path


def network(name: str, path: Path, num_classes: int = 3) -> torch.nn.Module:
    """A timm model with random weights, which are saved."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=num_classes)
    if path.suffix == ".safetensors":
        save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict()}, path)
    return model.eval()


def normalised(path: Path, split: str, model: torch.nn.Module) -> torch.Tensor:
    with np.load(path) as arrays:
        pixels = torch.tensor(arrays[f"{split}_images"]).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def test_stored_features_give_the_same_numbers_and_are_not_computed_again(run, printed, tmp_path, monkeypatch):
    words = [str(run), "--features", str(tmp_path / "features")]
    collapse.main([*words, "--output", str(tmp_path / "first")])
    stores = training.written(tmp_path / "features")
    assert stores.keys() == {"train.safetensors", "test.safetensors"}
    monkeypatch.setattr(CifarNet, "forward", None)  # nothing may call it
    collapse.main([*words, "--output", str(tmp_path / "second")])
    assert training.written(tmp_path / "features") == stores
    plain, *others = (
        json.loads((place / "collapse.json").read_text())
        for place in (run / "collapse", tmp_path / "first", tmp_path / "second")
    )
    for split in ("train", "test"):
        for record in others:
            assert record[split] == pytest.approx(plain[split], rel=1e-4, abs=1e-7)


def test_features_of_other_weights_and_of_a_timm_model_are_refused(run, last, tmp_path):
    features = ["--features", str(tmp_path / "features")]
    collapse.main([str(run), *features, "--output", str(tmp_path / "first")])
    checkpoint = torch.load(last, weights_only=True)
    name = next(name for name in checkpoint["state_dict"] if name.startswith("backbone."))
    checkpoint["state_dict"][name] += 1
    torch.save(checkpoint, tmp_path / "other.ckpt")
    config = ["-c", str(run / "config.yaml")]
    with pytest.raises(
        UserError, match=r"train\.safetensors has features of other weights: remove it, or name another folder"
    ):
        collapse.main([str(tmp_path / "other.ckpt"), *config, *features, "--output", str(tmp_path / "second")])
    with pytest.raises(UserError, match="--features goes with a run"):
        collapse.main(["--timm", "resnet20_cifar", "--data", "Digits", *features])


@pytest.fixture(scope="module")
def printed(run: Path) -> str:
    """What the command prints of the run."""
    with redirect_stdout(StringIO()) as out:
        collapse.main([str(run)])
    return out.getvalue()


def test_numbers_of_a_run_are_those_computed_from_scratch_on_the_images_it_was_trained_on(run, last, printed):
    record = json.loads((run / "collapse" / "collapse.json").read_text())
    model = Classifier.load_from_checkpoint(last).eval()
    data = Digits(imbalance_ratio=20, std=[0.5], max_count=40)
    seen = {}
    for split in ("train", "test"):
        seen[split] = features, logits, labels = training.seen(data, split, model.embed, model)
        check(record[split], features, logits, labels, model.head.weight.detach())
        assert f"{record[split]['nc1']:.4g}" in printed
    _, centres = measure(seen["train"][0], seen["train"][2])
    agrees = oracle.nearest_centre(centres, seen["test"][0].double()) == seen["test"][1].argmax(1).numpy()
    assert record["test"]["nc4"] == pytest.approx(agrees.mean())
    assert "nc4" not in record["train"]
    assert record["data"] == {
        "class": "Digits",
        "dataset": "Digits",
        "fingerprint": data.fingerprint,
        "class_counts": data.class_counts.tolist(),
        "folder": None,
    }


def test_results_of_a_run_lie_in_its_folder_with_figures(run, printed):
    assert {file.name for file in (run / "collapse").iterdir()} == {"collapse.json", *FIGURES}
    assert f"{run / 'collapse'}: collapse.json and 6 figures" in printed


def nc1(output: Path) -> float:
    return json.loads((output / "collapse.json").read_text())["train"]["nc1"]


def test_a_checkpoint_in_a_run_is_measured_as_the_run(run, last, printed, tmp_path, capsys):
    collapse.main([last, "--output", str(tmp_path)])
    assert "warning" not in capsys.readouterr().err
    assert nc1(tmp_path) == nc1(run / "collapse")


def test_other_training_images_than_the_checkpoints_are_told_in_one_line(run, last, printed, tmp_path, capsys):
    collapse.main([last, "--data.seed=3", "--output", str(tmp_path)])
    (told,) = [text for text in capsys.readouterr().err.splitlines() if "warning" in text]
    assert told.startswith("etflight: warning: Digits has other training images")
    assert nc1(tmp_path) != nc1(run / "collapse")


def test_measurements_of_other_images_are_not_replaced(run, printed):
    before = (run / "collapse/collapse.json").read_bytes()
    with pytest.raises(UserError, match=r"collapse\.json holds other results .data fingerprint: .*give --output"):
        collapse.main([str(run), "--data.imbalance_ratio=1"])
    assert (run / "collapse/collapse.json").read_bytes() == before


def test_a_set_of_the_users_own_file_replaces_that_of_the_run(run, tmp_path, capsys):
    (tmp_path / "own.yaml").write_text("data: {class_path: Digits, init_args: {imbalance_ratio: 1, max_count: 30}}")
    collapse.main(["-c", str(tmp_path / "own.yaml"), "--output", str(tmp_path), str(run)])
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert record["data"]["class_counts"] == [30] * 10
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "Digits has 30 training images of class 0, but the checkpoint was trained on 40" in told


@pytest.mark.parametrize("command", [collapse, describe])
def test_a_path_that_tells_no_data_is_one_line(command, last, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(last, "alone.ckpt")
    with pytest.raises(UserError, match="nowhere does not exist: give a run folder"):
        command.main(["nowhere"])
    with pytest.raises(UserError, match=r"\. has no config\.yaml that tells the data"):
        command.main(["."])
    with pytest.raises(SystemExit):
        command.main(["alone.ckpt"])
    assert capsys.readouterr().err.startswith("etflight: error: these arguments are required: --data (see")


def test_describe_shows_the_data_of_a_run_and_tells_where_they_are_others_now(run, tmp_path, capsys):
    for given, lines in (([], 0), (["--data.seed=3"], 1)):
        describe.main([str(run), *given, "--output", str(tmp_path)])
        counts = json.loads((tmp_path / "describe.json").read_text())["class_counts"]["train"]
        assert counts == Digits(imbalance_ratio=20, max_count=40).class_counts.tolist()
        assert capsys.readouterr().err.count("has other training images") == lines


# --- timm -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "suffix", "mean"), [("resnet20_cifar", "pt", None), ("test_convnext", "safetensors", 0.2)]
)
def test_timm_numbers_are_those_of_its_own_classifier_and_normalisation(name, suffix, mean, images, tmp_path):
    weights = tmp_path / f"weights.{suffix}"
    model = network(name, weights)
    data = ["--data=ArrayImages", f"--data.path={images}"]
    if mean is not None:
        data.append(f"--data.mean=[{mean}]")  # given by the user, it stays
        model.pretrained_cfg["mean"] = [mean] * 3
    collapse.main(["--timm", name, "--weights", str(weights), *data, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "collapse.json").read_text())
    for split in ("train", "test"):
        with torch.no_grad():
            maps = model.forward_features(normalised(images, split, model))
            features, logits = model.forward_head(maps, pre_logits=True), model.forward_head(maps)
        with np.load(images) as arrays:
            labels = torch.tensor(arrays[f"{split}_labels"])
        # pixels are normalised by other float32 steps
        check(record[split], features.flatten(1), logits, labels, model.get_classifier().weight.detach(), rel=2e-5)


class OwnHead(LinearHead):
    """One of the user's own."""


def test_a_head_of_the_users_own_is_imported_on_demand(etflight_command, tmp_path):
    model = Classifier(10, "resnet20_cifar", in_chans=1, head=OwnHead, loss=CrossEntropyLoss)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, tmp_path / "my.ckpt")
    arguments = ["collapse", "my.ckpt", "--data=Digits", "--data.max_count=5"]
    etflight_command(*arguments, cwd=tmp_path).assert_refused(f"import its module before (--imports {__name__}; ")
    etflight_command.succeed(*arguments, f"--imports={__name__}", cwd=tmp_path)
    assert (tmp_path / "collapse" / "collapse.json").is_file()


def test_bad_input_ends_in_one_line_that_says_the_mend(run, last, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    network("test_resnet", tmp_path / "w.safetensors")
    torch.save({"code": print}, tmp_path / "code.pt")
    Path("mine").mkdir()
    Path("mine/test_spectrum.png").touch()
    arrays = ["--data=ArrayImages", f"--data.path={images}"]
    own = ["--timm=test_resnet", "--weights=w.safetensors"]
    for arguments, status, message in (
        ([], 2, "data"),
        (["--data=Digits"], 1, r"give RUN \(.*\) or --timm NAME"),
        ([str(run), "--timm=test_resnet"], 1, "measures one model"),
        ([last, "--weights=w.safetensors"], 1, "--weights goes with --timm"),
        ([last, *arrays], 1, "decides between 10 classes, but ArrayImages .*images.npz has 3"),
        ([last, "--accelerator=tpu9"], 1, "--accelerator 'tpu9' is unknown: give auto, gpu, "),
        ([last, "--device=cpu"], 1, "--device has become --accelerator, .*: give --accelerator cpu"),
        ([last, "--output", "mine"], 1, "mine/test_spectrum.png has no collapse.json beside it"),
        ([last, "--imports", "no_such"], 1, "--imports no_such"),
        ([*own, "--data=Digits"], 1, "decides between 3 classes, but Digits has 10"),
        (["--timm=resnet18", *arrays], 1, "decides between 1000 classes, but .* has 3: give --weights FILE"),
        (["--timm=test_resnett", *arrays], 1, "no timm model is called 'test_resnett': near matches: test_resnet"),
        (["--timm=test_resnet", "--weights=code.pt", *arrays], 1, "refused and nothing in it was run"),
        (["--timm=test_convnext", "--weights=w.safetensors", *arrays], 1, "does not fit test_convnext"),
    ):
        monkeypatch.setattr(sys, "argv", ["etflight", "collapse", *arguments])
        try:
            got = __main__.run()
        except SystemExit as stop:
            got = stop.code
        error = capsys.readouterr().err.strip()
        assert (got, error.count("\n")) == (status, 0), (arguments, error)
        assert re.search(f"etflight: error: .*{message}", error), (message, error)
