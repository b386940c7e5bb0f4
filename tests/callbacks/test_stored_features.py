"""A training on a frozen backbone reads its features, computed once, and is the training that it was on images."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from safetensors import safe_open
from torch.testing import assert_close

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks import FineTuning, NeuralCollapseMonitor
from etflight.cli.stages import main
from etflight.data import ClassSubset, Digits, FolderImages
from tests import training
from tests.left_by_runs import assert_resumes, read
from tests.training import QUIET, read_csv, save_folders

DATA = {"imbalance_ratio": 20, "batch_size": 50, "val_fraction": 0.1}
ONCE, EACH = "goes over the images once", "goes over the training images in every epoch"


NORMALISED = partial(LinearHead, batch_norm=True)


def new_model(kind=Classifier, head=NORMALISED):
    seed_everything(0, verbose=False)
    return kind(10, "resnet20_cifar", in_chans=1, head=head, loss=CrossEntropyLoss)


class Seen(Callback):
    """How many images the backbone has had, how many features the head, and the state of the model after each epoch."""

    def __init__(self):
        self.images, self.features, self.losses, self.states = 0, 0, [], []

    def setup(self, trainer, pl_module, stage):
        pl_module.backbone.register_forward_pre_hook(self._count("images"))
        pl_module.head.embedder.register_forward_pre_hook(self._count("features"))

    def _count(self, name):
        return lambda _, args: setattr(self, name, getattr(self, name) + len(args[0]))

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(float(outputs["loss"]))


def train(data, *callbacks, tuning=None, model=None, **options):
    seen = Seen()
    tuning = {"freeze": ["backbone"], **(tuning or {})}
    trainer = training.new_trainer(FineTuning(**tuning), *callbacks, seen, **{"max_epochs": 3, **options})
    trainer.fit(model or new_model(), datamodule=data)
    return seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_losses_and_weights_are_those_of_the_training_on_images(precision, tmp_path):
    data = Digits(**DATA)
    monitor = partial(NeuralCollapseMonitor, space="backbone")
    on_features = train(data, monitor(), precision=precision, default_root_dir=tmp_path)
    on_images = train(
        Digits(**DATA), monitor(), tuning={"store_features": False}, precision=precision, default_root_dir=tmp_path
    )
    once = len(data.split("train")) + len(data.split("val"))
    assert on_features.images == once
    assert on_images.images > 3 * once
    tolerance = 1e-5 if precision == "32-true" else 3e-2
    assert on_features.losses == pytest.approx(on_images.losses, rel=tolerance)
    for own, other in zip(on_features.states, on_images.states, strict=True):
        assert_close(own, other, rtol=tolerance, atol=tolerance)


def test_afterwards_the_data_give_images_again_however_the_training_ended():
    data = Digits(**DATA)
    train(data)
    with pytest.raises(RuntimeError):
        train(data, Break())
    for split in ("train", "val", "test"):
        assert next(iter(data.eval_dataloader(split)))[0].ndim == 4


class Break(Callback):
    def on_train_epoch_end(self, *_):
        raise RuntimeError


class Noisy(Classifier):
    def features(self, images):
        return super().features(images + 0.1 * torch.randn_like(images))


@pytest.mark.parametrize(
    "options",
    [
        {"tuning": {"unfreeze_epoch": 2}},
        {"tuning": {"freeze_statistics": False}},
        {"tuning": {"freeze": ["layer1"]}},
        {"tuning": {"store_features": False}},
        {"limit_train_batches": 2},
        {"max_epochs": 1},
        {"max_steps": 10, "max_epochs": -1},
        {"fast_dev_run": True},
        {"model": Noisy},
    ],
    ids=str,
)
def test_nothing_changes_where_the_backbone_would_not_see_each_image_twice_alike(options, caplog):
    model = new_model(options.pop("model", Classifier))
    with caplog.at_level("INFO"):
        seen = train(Digits(**DATA), model=model, limit_val_batches=0, num_sanity_val_steps=0, **options)
    assert seen.images == seen.features
    assert ONCE not in caplog.text
    assert EACH not in caplog.text


def test_a_monitor_of_layers_needs_the_backbone(caplog, tmp_path):
    monitor = NeuralCollapseMonitor(layers=["layer1"], before_training=False)
    assert train(Digits(**DATA), monitor, default_root_dir=tmp_path).images > 3 * 300


def test_augmented_images_are_trained_on_as_before_and_a_line_says_what_to_turn_off(caplog):
    with caplog.at_level("INFO"):
        seen = train(Digits(**DATA, flip=True, mixup=0.2), max_epochs=2, limit_val_batches=0)
    assert seen.images == seen.features
    assert ONCE not in caplog.text
    (line,) = [record.message for record in caplog.records if EACH in record.message]
    assert "with flip=False mixup=0.0 it would do so only once" in line


def test_a_data_module_knows_what_changes_its_training_images(tmp_path):
    save_folders(tmp_path, train={"a": 2, "b": 2}, test={"a": 1, "b": 1})
    root = str(tmp_path)
    assert Digits().changing == {}
    assert Digits(views=2, cutout=3).changing == {"data.cutout": 0, "data.views": 1}
    photos = {"min_crop_scale": 0.1, "flip": True, "skip_corrupt": True}
    changing = {"data.min_crop_scale": 1.0, "data.flip": False, "data.skip_corrupt": False}
    assert FolderImages(root, **photos).changing == changing
    assert FolderImages(root, min_crop_scale=1, flip=False).changing == {}
    inner = FolderImages(root, min_crop_scale=0.5)
    some = ClassSubset(images=inner, classes="0,1", color_jitter=0.1, flip=False).changing
    assert some == {"data.images.min_crop_scale": 1.0, "data.color_jitter": 0.0}


FIT = ["--data", "Digits", "--data.imbalance_ratio", 20, "--data.batch_size", 100, "--model.backbone", "resnet20_cifar",
       "--model.head", "LinearHead", "--model.head.batch_norm", "true", "--model.loss", "CrossEntropyLoss",
       "--fine_tuning.freeze", "[backbone]", "--monitor", "null", "--trainer.max_epochs", 2, *QUIET]  # fmt: skip


def test_a_run_keeps_its_features_resumes_bit_by_bit_and_is_tested_on_images(tmp_path):
    assert_resumes(["fit", *FIT], tmp_path, [1, 6])
    features = tmp_path / "whole" / "features"
    assert {file.name for file in features.iterdir()} == {"train.safetensors", "val.safetensors"}
    with safe_open(features / "train.safetensors", "pt") as store:
        assert store.metadata()["precision"] == "float32"
    place = ["--trainer.default_root_dir", str(tmp_path)]
    main([*map(str, ["fit", *FIT, "--fine_tuning.store_features", "false"]), *place, "--name", "images"])
    assert not (tmp_path / "images" / "features").exists()
    for name in ("whole", "images"):
        test = ["test", "--data", "Digits", *QUIET, "--ckpt_path", tmp_path / name / "checkpoints/last.ckpt"]
        main([*map(str, test), *place, "--name", name])
    states = [read(tmp_path / name)["state_dict"] for name in ("whole", "images")]
    assert_close(*states, rtol=1e-4, atol=1e-5)
    rows = [read_csv(tmp_path / name / "metrics.csv") for name in ("whole", "images")]
    for own, other in zip(*rows, strict=True):
        for name in ("train/loss", "val/loss"):
            assert own[name] == other[name] == "" or float(own[name]) == pytest.approx(float(other[name]), rel=1e-5)


def parallel(rank, folder, processes):
    seen = train(
        Digits(**{**DATA, "batch_size": 60 // processes}), devices=processes, default_root_dir=folder,
        strategy="auto" if processes == 1 else "ddp", model=new_model(head=LinearHead),
    )  # fmt: skip
    return seen.images, seen.states[-1]


def test_two_processes_share_the_images_and_train_as_one(two_ready_processes, tmp_path):
    images, alone = parallel(0, tmp_path, 1)
    (first_images, first), (second_images, second) = two_ready_processes(parallel, [(tmp_path, 2)] * 2)
    assert first_images + second_images == images
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first, alone, rtol=0, atol=1e-4)  # of weights up to 4
