"""Features of a split on disk: what is stored, resumed, refused."""

import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from etflight import Classifier
from etflight.analysis.outputs import outputs, split_features, with_stored_features
from etflight.analysis.store import PartialFile, facts_of, store_of
from etflight.data import Digits, FolderImages
from etflight.utils.errors import UserError
from tests.training import new_trainer, save_folders, seen


def new_model(**arguments):
    torch.manual_seed(0)
    return Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1}, **arguments)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_store_has_the_features_of_a_plain_loop_and_is_read_again_without_the_backbone(tmp_path, precision):
    model, data = new_model().eval(), Digits(eval_batch_size=77)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        features, labels = seen(data, "test", model.features)
    for _ in range(2):
        found = split_features(model, data, "test", folder=tmp_path, precision=precision)
        assert found.features.dtype == getattr(torch, precision)
        assert_close(found.features, features.to(found.features.dtype), rtol=0, atol=0)
        assert torch.equal(found.labels, labels)
        facts = facts_of(model, data, "test", precision)
        model.backbone.forward = None  # the second time nothing is computed
    assert facts == facts_of(new_model(), Digits(), "test", precision)
    assert [file.name for file in tmp_path.iterdir()] == ["test.safetensors"]


def test_a_pass_that_was_killed_goes_on_after_the_last_whole_row(tmp_path):
    model, data = new_model(), Digits(eval_batch_size=50)
    whole, passes = split_features(model, data, "test"), []
    model.backbone.register_forward_hook(lambda *_: passes.append(len(passes)) or _stop_at(4, passes))
    with pytest.raises(KeyboardInterrupt):
        split_features(model, data, "test", folder=tmp_path)
    (partial,) = tmp_path.iterdir()
    with partial.open("ab") as file:
        file.write(b"part of a row")
    assert PartialFile(store_of(tmp_path, "test"), facts_of(model, data, "test", "float32"), 0, 1).rows == 150
    assert_close(split_features(model, data, "test", folder=tmp_path).features, whole.features, rtol=0, atol=0)
    assert len(passes) == 4 + -(-(len(whole.labels) - 150) // 50)
    assert not partial.exists()


def _stop_at(number, passes):
    if len(passes) == number:
        raise KeyboardInterrupt


@pytest.mark.parametrize("damage", [b"", b"{}\n", b'{"width": 3, "facts": {}}\n' + b"0" * 99, b"\x80\x04garbage"])
def test_a_partial_file_of_something_else_is_started_anew(tmp_path, damage):
    model, data = new_model(), Digits()
    PartialFile(store_of(tmp_path, "test"), {"precision": "float32"}, 0, 1).path.write_bytes(damage)
    found = split_features(model, data, "test", folder=tmp_path)
    assert_close(found.features, split_features(model, data, "test").features, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "data", "words"),
    [
        ({"model_kwargs": {"width": 2}}, {}, "arguments .* weights"),
        ({"backbone": "resnet32_cifar"}, {}, "backbone .resnet20_cifar instead of resnet32_cifar."),
        ({}, {"mean": [0.2]}, "preprocessing"),
        ({}, {"imbalance_ratio": 10}, "images"),
        ({}, {"label_noise": 0.2}, "images"),
    ],
)
def test_a_store_that_does_not_fit_is_refused_by_what_differs(tmp_path, model, data, words):
    split_features(new_model(), Digits(), "train", folder=tmp_path)
    torch.manual_seed(0)
    other = Classifier(
        10, model.get("backbone", "resnet20_cifar"), in_chans=1, model_kwargs=model.get("model_kwargs", {"width": 1})
    )
    with pytest.raises(UserError, match=words):
        split_features(other, Digits(**data), "train", folder=tmp_path)
    with pytest.raises(UserError, match="precision"):
        split_features(new_model(), Digits(), "train", folder=tmp_path, precision="bfloat16")


def test_files_that_have_changed_are_noticed(tmp_path):
    save_folders(tmp_path / "photos", train={"a": 3, "b": 2}, test={"a": 2, "b": 2})
    data, model = FolderImages(str(tmp_path / "photos"), image_size=16), Classifier(2, "resnet20_cifar")
    split_features(model, data, "train", folder=tmp_path)
    with next((tmp_path / "photos" / "train").rglob("*.png")).open("ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match="images"):
        split_features(model, data, "train", folder=tmp_path)


class Boom:
    def __reduce__(self):
        return (print, ("this must never run",))


def _damaged(kind, good):
    if kind == "pickle":
        return pickle.dumps(Boom())
    return {"cut": good[: len(good) // 2], "empty": b"", "noise": np.random.default_rng(0).bytes(500)}[kind]


@pytest.mark.parametrize("kind", ["pickle", "cut", "empty", "noise", "other tensors", "other labels"])
def test_a_damaged_or_hostile_store_gets_one_line_and_runs_nothing(tmp_path, capsys, kind):
    model, data, file = new_model(), Digits(), store_of(tmp_path, "test")
    good = split_features(model, data, "test", folder=tmp_path)
    facts = facts_of(model, data, "test", "float32")
    if kind == "other tensors":
        save_file({"features": good.features.half(), "labels": good.labels.clone()}, file, facts)
    elif kind == "other labels":
        save_file({"features": good.features.clone(), "labels": good.labels.flip(0).contiguous()}, file, facts)
    else:
        file.write_bytes(_damaged(kind, file.read_bytes()))
    with pytest.raises(UserError, match=re.escape(str(file))) as refused:
        split_features(model, data, "test", folder=tmp_path)
    assert "\n" not in str(refused.value)
    assert "never run" not in capsys.readouterr().out


def test_images_that_cannot_be_read_are_counted_and_no_store_is_written(tmp_path):
    save_folders(tmp_path / "photos", train={"a": 3, "b": 2}, test={"a": 2, "b": 2})
    next((tmp_path / "photos" / "train").rglob("*.png")).write_bytes(b"no picture")
    data = FolderImages(str(tmp_path / "photos"), image_size=16, skip_corrupt=True)
    with pytest.raises(UserError, match="1 images of train"):
        split_features(Classifier(2, "resnet20_cifar"), data, "train", folder=tmp_path / "features")
    assert not list((tmp_path / "features").iterdir())


def _stored(rank, folder):
    return tuple(split_features(new_model(), Digits(), "test", folder=folder))


def test_two_processes_write_the_store_of_one(tmp_path, two_processes):
    alone = split_features(new_model(), Digits(), "test", folder=tmp_path / "one")
    for features, labels in two_processes(_stored, [(tmp_path / "two",)] * 2):
        assert_close(features, alone.features, rtol=1e-5, atol=1e-5)
        assert torch.equal(labels, alone.labels)
    again = split_features(new_model(), Digits(), "test", folder=tmp_path / "two")
    assert_close(again.features, alone.features, rtol=1e-5, atol=1e-5)


def test_a_data_module_with_features_takes_the_place_of_its_images(tmp_path):
    model, data = new_model(), Digits()
    twin = with_stored_features(model, data, ("train", "val", "test"), tmp_path)
    for split in ("train", "test"):
        for found, expected in zip(outputs(model, twin, split), outputs(model, data, split), strict=True):
            assert_close(found, expected)
    model.backbone.requires_grad_(False)
    trainer = new_trainer(max_epochs=1)
    trainer.fit(model, datamodule=twin)
    (tested,) = trainer.test(model, datamodule=twin, verbose=False)
    (by_images,) = trainer.test(model.eval(), datamodule=data, verbose=False)
    assert tested["test/acc"] == pytest.approx(by_images["test/acc"], abs=1e-6)


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UserError, match=r"folder .*file cannot be written to"):
        split_features(new_model(), Digits(), "test", folder=tmp_path / "file")
