"""The shipped protocols are those that were published, number by number."""

from inspect import signature
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml

import etflight.data
from etflight import Classifier
from etflight.backbones import build_backbone
from etflight.runs.study import read_study

CONFIGS = Path(__file__).parents[2] / "configs"


def resolved(*files):
    """The plain data of configuration files, later over earlier."""

    def lay(over, content):
        for key, value in content.items():
            over[key] = lay(dict(over.get(key) or {}), value) if isinstance(value, dict) else value
        return over

    merged = {}
    for file in files:
        lay(merged, yaml.safe_load(file.read_text()))
    return merged


class Protocol(NamedTuple):
    """Yang et al. 2022 as their released code has it; the augmentation by crop padding, mirroring, mean and standard deviation."""

    data: str
    ratio: int
    backbone: str
    d: int
    epochs: int
    batch: int
    sgd: tuple[float, float, float]  # learning rate, momentum, weight decay
    schedule: tuple[str, dict[str, object]]
    mixup: float
    augmentation: tuple[int, bool, tuple[float, ...], tuple[float, ...]]


def data_module(config):
    """Of a class switched by a later file, with the options of the earlier one that it takes, too, as the command line has it."""
    kind = getattr(etflight.data, config["data"]["class_path"])
    options = {"root": "x", **config["data"]["init_args"]}
    return kind(**{name: value for name, value in options.items() if name in signature(kind).parameters})


def protocol_of(config, processes=1):
    """What a configuration comes to."""
    module, model = data_module(config), config["model"]
    kinds = signature(Classifier).parameters
    optimizer = model.get("optimizer", {"init_args": kinds["optimizer"].default.keywords})["init_args"]
    with torch.device("meta"):
        _, d = build_backbone(model["backbone"], model_kwargs=model.get("model_kwargs"))
    return Protocol(
        data=type(module).__name__,
        ratio=module.imbalance_ratio,
        backbone=model["backbone"],
        d=d,
        epochs=config["trainer"]["max_epochs"],
        batch=module.batch_size * processes,
        sgd=(optimizer["lr"], optimizer["momentum"], optimizer["weight_decay"]),
        schedule=(model["lr_scheduler"]["class_path"].rpartition(".")[2], model["lr_scheduler"].get("init_args", {})),
        mixup=module.mixup,
        augmentation=(module._augment.crop_padding, module._augment.flip, *module._statistics),
    )


CIFAR = (4, True, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NOTHING = (0, False, (0.5,), (0.5,))
STEPS = ("WarmupMultiStep", {"milestones": [160, 180]})  # after a warm-up of 5 epochs


@pytest.mark.parametrize("backbone", ["", "_densenet"])
@pytest.mark.parametrize(
    ("name", "data", "augmentation"),
    [("cifar10_lt", "CIFAR10", CIFAR), ("cifar100_lt", "CIFAR100", CIFAR), ("svhn_lt", "SVHN", NOTHING), ("stl10_lt", "STL10", NOTHING)],
)  # fmt: skip
def test_the_grid_of_small_images_is_the_published_one(name, data, augmentation, backbone):
    study = read_study(CONFIGS / "studies/yang2022.yaml")
    assert sorted(study.ratios) == [50, 100, 200]
    assert {"ce", "etf_dr_balanced"} <= set(study.arms)
    for arm in study.arms.values():
        found = protocol_of(resolved(*study.sets[name + backbone], *arm))
        assert found == Protocol(
            data=data,
            ratio=100,
            backbone="densenet_bc_150_cifar" if backbone else "resnet32_cifar",
            d=510 if backbone else 128 if data == "CIFAR100" else 64,
            epochs=200,
            batch=128,
            sgd=(0.1, 0.9, 2e-4),
            schedule=STEPS,
            mixup=1.0,
            augmentation=augmentation,
        )


@pytest.mark.parametrize(
    ("name", "data", "batch", "statistics"),
    [
        ("imagenet_lt", "ImageNetLT", 1024, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("places_lt", "PlacesLT", 1024, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        ("inat2018", "INaturalist2018", 1024, ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))),
        ("cub200_scratch", "CUB200", 256, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),  # a small set
    ],
)
def test_sets_of_photographs_are_trained_by_the_protocol_of_imagenet_lt_on_eight_gpus(name, data, batch, statistics):
    config = resolved(CONFIGS / f"data/{name}.yaml", CONFIGS / "trainer/ddp.yaml")
    assert protocol_of(config, processes=8) == Protocol(
        data=data,
        ratio=1,
        backbone="resnet50_wide4",
        d=4096,
        epochs=90,
        batch=batch,
        sgd=(0.1, 0.9, 5e-4),
        schedule=("WarmupCosine", {"warmup_epochs": 0}),
        mixup=0.2,
        augmentation=(0, True, *statistics),
    )
    module = data_module(config)
    assert module._square == (224, 0.875, 0.08)  # RandomResizedCrop
    assert module.color_jitter == 0.4
    assert module.num_workers > 0
    assert config["trainer"]["strategy"] == "ddp"
