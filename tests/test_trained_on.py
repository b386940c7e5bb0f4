"""What a checkpoint knows of its images is what it is used with, or a line says in what it is not."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from etflight import Classifier
from etflight.cli import main
from etflight.commands import collapse, export
from etflight.data import ArrayImages, Digits
from etflight.errors import UserError

QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_model_summary", "false", "--trainer.enable_progress_bar", "false",
    "--trainer.logger", "false",
]  # fmt: skip


def new_trainer(**options):
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", logger=False, **{"max_epochs": 3, **quiet, **options})


# --- shapes ---------------------------------------------------------------------------------------------------------


def arrays(path, *, channels, classes=10):
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, channels), dtype=np.uint8)
    both = {f"{split}_images": images for split in ("train", "test")}
    np.savez(path, **both, **{f"{split}_labels": np.arange(40) % classes for split in ("train", "test")})
    return ["--data", "ArrayImages", "--data.path", str(path)]


@pytest.fixture(scope="module")
def of_channels(tmp_path_factory):
    """Checkpoints of models of grey and of RGB images."""
    root = tmp_path_factory.mktemp("channels")
    for channels in (1, 3):
        arrays(root / f"{channels}.npz", channels=channels)
        trainer = new_trainer(max_epochs=1)
        trainer.fit(
            Classifier(10, "resnet20_cifar", in_chans=channels), datamodule=ArrayImages(str(root / f"{channels}.npz"))
        )
        trainer.save_checkpoint(root / f"{channels}.ckpt")
    return root


def use(stage, checkpoint, data, place):
    if stage == "collapse":
        collapse.main(["--ckpt_path", checkpoint, *data, "--output", str(place / "out")])
    elif stage == "export":
        export.main([checkpoint, *data, "--output", str(place / "out")])
    else:
        run = ["--trainer.default_root_dir", str(place), "--name", "r"]
        main([stage, "--ckpt_path", checkpoint, *data, *QUIET, *run])


@pytest.mark.parametrize("stage", ["test", "validate", "predict", "fit", "collapse", "export"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_other_channels_are_refused_with_both_numbers_and_the_mend(channels, stage, of_channels, tmp_path):
    path, other = str(of_channels / f"{channels}.ckpt"), of_channels / f"{4 - channels}.npz"
    with pytest.raises(UserError) as refused:
        use(stage, path, ["--data", "ArrayImages", "--data.path", str(other)], tmp_path)
    images = "1 channel" if channels == 1 else "3 channels"
    assert str(refused.value) == (
        f"checkpoint {path} takes images of {images}, but ArrayImages {other} has {4 - channels}: give the data it was trained on"
    )
    assert list(tmp_path.rglob("*.*")) == []


def test_a_model_built_for_other_classes_or_channels_than_the_data_have_is_refused_in_python_too():
    for model, reason in (
        (Classifier(10, "resnet20_cifar"), "the model takes images of 3 channels, but Digits has 1"),
        (Classifier(7, "resnet20_cifar", in_chans=1), "the model decides between 7 classes, but Digits has 10"),
    ):
        for stage in ("fit", "test", "validate", "predict"):
            with pytest.raises(UserError, match=reason):
                getattr(new_trainer(), stage)(model, datamodule=Digits())


def test_a_checkpoint_whose_images_have_other_channels_than_its_model_is_refused(of_channels, tmp_path):
    saved = torch.load(of_channels / "1.ckpt", weights_only=True)
    saved["preprocessing"] = torch.load(of_channels / "3.ckpt", weights_only=True)["preprocessing"]
    torch.save(saved, tmp_path / "mixed.ckpt")
    with pytest.raises(UserError, match="its preprocessing has 3 channels, its model 1"):
        Classifier.load_from_checkpoint(tmp_path / "mixed.ckpt")
