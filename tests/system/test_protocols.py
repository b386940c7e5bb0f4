"""The shipped protocols are those that were published, number by number."""

import pytest
import torch

import etflight.data
from etflight.backbones import build_backbone
from etflight.runs.study import read_study
from tests.system.test_published_arms import CONFIGS, LONG, facts, name_of, resolved

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def protocol_of(config, epochs):
    """What a configuration comes to, its data module, and the learning rate's factors in these epochs."""
    data = getattr(etflight.data, name_of(config["data"]))(**config["data"]["init_args"])
    model = config["model"]
    with torch.device("meta"):
        _, d = build_backbone(model["backbone"], model_kwargs=model["model_kwargs"])
    # crop padding, mirroring, mean and standard deviation
    augmentation = (*(data.training_options[name] for name in ("crop_padding", "flip")), *data._statistics)
    found = {"data": type(data).__name__, "ratio": data.imbalance_ratio, "backbone": model["backbone"], "d": d}
    return facts(config, epochs) | found | {"augmentation": augmentation}, data


CIFAR = (4, True, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NOTHING = (0, False, (0.5,), (0.5,))


@pytest.mark.parametrize("backbone", ["", "_densenet"])
@pytest.mark.parametrize(
    ("name", "data", "augmentation"),
    [("cifar10_lt", "CIFAR10", CIFAR), ("cifar100_lt", "CIFAR100", CIFAR), ("svhn_lt", "SVHN", NOTHING), ("stl10_lt", "STL10", NOTHING)],
)  # fmt: skip
def test_the_grid_of_small_images_is_the_published_one(name, data, augmentation, backbone, etflight_command):
    """Yang et al. 2022, as their released code has it."""
    study = read_study(CONFIGS / "studies/yang2022.yaml")
    assert sorted(study.ratios) == [50, 100, 200]
    assert {"ce", "etf_dr_balanced"} <= set(study.arms)
    expected = LONG | {
        "data": data,
        "ratio": 100,
        "mixup": 1.0,
        "augmentation": augmentation,
        "backbone": "densenet_bc_150_cifar" if backbone else "resnet32_cifar",
        "d": 510 if backbone else 128 if data == "CIFAR100" else 64,
        "width": 2 if data == "CIFAR100" and not backbone else 1,
    }
    files = [*study.sets[name + backbone], *study.arms["etf_dr_balanced"]]
    found, _ = protocol_of(resolved(etflight_command, files, CONFIGS.parent), expected["rates"])
    assert {key: found[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "data", "batch", "statistics"),
    [
        ("imagenet_lt", "ImageNetLT", 1024, IMAGENET),
        ("places_lt", "PlacesLT", 1024, IMAGENET),
        ("inat2018", "INaturalist2018", 1024, ((0.466, 0.471, 0.380), (0.195, 0.194, 0.192))),
        ("cub200_scratch", "CUB200", 256, IMAGENET),  # a small set
    ],
)
def test_sets_of_photographs_are_trained_by_the_protocol_of_imagenet_lt_on_eight_gpus(
    name, data, batch, statistics, etflight_command
):
    expected = {
        "data": data, "ratio": 1, "backbone": "resnet50_wide4", "d": 4096, "epochs": 90, "batch": batch // 8, "lr": 0.1,
        "momentum": 0.9, "weight_decay": 5e-4, "rates": {1: 1, 46: 0.5}, "mixup": 0.2, "augmentation": (0, True, *statistics),
    }  # fmt: skip
    files = [CONFIGS / f"data/{name}.yaml", CONFIGS / "trainer/ddp.yaml"]
    config = resolved(etflight_command, files, CONFIGS.parent)
    found, module = protocol_of(config, expected["rates"])
    assert {key: found[key] for key in expected} == expected
    assert module._square == (224, 0.875, 0.08)  # RandomResizedCrop
    assert module.color_jitter == 0.4
    assert module.num_workers > 0
    assert config["trainer"]["strategy"] == "ddp"
