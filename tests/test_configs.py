"""Every shipped YAML is parsed, and run for a step on tiny data of the right shape."""

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import yaml
from PIL import Image

from tests.large_sets import cub200

ROOT = Path(__file__).parent.parent / "configs"
# studies are data of `etflight study`, sweeps of `wandb sweep`
ALL = sorted(set(ROOT.rglob("*.yaml")) - set((ROOT / "study").iterdir()) - set((ROOT / "sweep").iterdir()))
PARTS = {"arm", "data", "trainer", "logger"}  # overlays: no experiment by themselves
EXPERIMENTS = [path for path in ALL if not PARTS & set(path.relative_to(ROOT).parts)]
OVERLAYS = [path for path in ALL if path not in EXPERIMENTS]
RANDOM = np.random.default_rng(0)


def name(path):
    return str(path.relative_to(ROOT))


def tiny_fashion(folder):
    raw = folder / "fashion"
    raw.mkdir()
    for split in ("train", "t10k"):
        images = RANDOM.integers(0, 256, (40, 28, 28), dtype=np.uint8)
        labels = (np.arange(40) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return ["--data.root", raw]


def tiny_cifar(folder, classes):
    records = RANDOM.integers(0, 256, (10000, 3072), dtype=np.uint8)
    labels = (np.arange(10000) % classes).astype(np.uint8)[:, None]
    if classes == 10:
        content = np.hstack([labels, records]).tobytes()
        files = {
            f"cifar-10-batches-bin/{f}.bin": content for f in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        }
    else:
        content = np.hstack([labels // 5, labels, records]).tobytes()
        files = {"cifar-100-binary/train.bin": content * 5, "cifar-100-binary/test.bin": content}
    for path, data in files.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(data)
    return ["--data.root", folder]


def tiny_signs(folder):
    images = RANDOM.integers(0, 256, (172, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(172) % 43
    arrays = {
        f"{split}_{kind}": a for split in ("train", "test") for kind, a in (("images", images), ("labels", labels))
    }
    np.savez(folder / "signs.npz", **arrays)
    return ["--data.path", folder / "signs.npz"]


def tiny_characters(folder):
    images = RANDOM.integers(0, 256, (242, 28, 28), dtype=np.uint8)
    np.savez(
        folder / "characters.npz", train_images=images, train_labels=np.arange(242), test_images=images[:8],
        test_labels=np.arange(8),
    )  # fmt: skip
    return ["--data.path", folder / "characters.npz"]


def tiny_folder(folder):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            (folder / "images" / split / label).mkdir(parents=True)
            for i in range(4):
                pixels = RANDOM.integers(0, 256, (40, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "images" / split / label / f"{i}.png")
    return ["--data.root", folder / "images", "--data.image_size", 32, "--data.num_workers", 0]


def tiny_weights(folder):
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), folder / "weights.safetensors")
    return ["--model.backbone", "test_resnet", "--fine_tuning.weights", folder / "weights.safetensors"]


def tiny_data(config, folder):
    match config.parent.name, config.stem:
        case "fashion_mnist_lt", _:
            return [*tiny_fashion(folder), "--data.imbalance_ratio", 2]
        case "cifar10_lt", _:
            return tiny_cifar(folder, 10)
        case "cifar100_lt", _:
            return tiny_cifar(folder, 100)
        case "gtsrb" | "gtsrb_lite0", _:
            return tiny_signs(folder)
        case "omniglot", _:
            return tiny_characters(folder)
        case "imagenet_lt" | "places_lt" | "inat2018", _:  # a network of 0.1 instead of 63 M parameters, other images
            return ["--data", "FolderImages", *tiny_folder(folder), "--model.backbone", "test_resnet"]
        case "cub200", _:
            cub200(folder / "birds")  # whole: 11,788 links to one file
            return [
                "--data.root",
                folder / "birds",
                "--data.image_size",
                32,
                "--data.num_workers",
                0,
                *tiny_weights(folder),
            ]
        case _, "folder":
            return tiny_folder(folder)
        case _, "folder_fine_tuning":
            return [*tiny_folder(folder), *tiny_weights(folder)]
    return []


POST_HOC = {"tau_norm", "ncm"}  # they train nothing

# An experiment is a protocol and an arm. Every arm is trained for a step on the digits, every protocol with one arm.
TRAINED = [
    path
    for path in EXPERIMENTS
    if (path.parent.name in ("digits", "configs") and path.stem not in POST_HOC)
    or path.stem in ("ce", "ce_no_mixup", "scratch")
    or path.parent.name == "omniglot"
]


SECOND_STAGES = {"crt", "lws", "mislas"}  # they start from the set's run of the arm ce, the last from one with mixup


@pytest.fixture(scope="module")
def first_stage(etflight_command, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("first_stage")
    result = etflight_command(
        "fit", "-c", ROOT / "digits/ce.yaml", "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1,
        "--trainer.accelerator", "cpu", cwd=cwd,
    )  # fmt: skip
    assert result.status == 0, result.err
    return cwd / "runs/digits/ce/checkpoints/last.ckpt"


@pytest.mark.parametrize("config", TRAINED, ids=name)
def test_config_trains_a_step(config, first_stage, etflight_command, tmp_path):
    stage_one = ["--fine_tuning.checkpoint", first_stage] if config.stem in SECOND_STAGES else []
    result = etflight_command(
        "fit", "-c", config, *tiny_data(config, tmp_path), "--data.batch_size", 8, "--trainer.accelerator", "cpu",
        "--trainer.fast_dev_run", "true", *stage_one, cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err
    assert not (tmp_path / "runs").exists()  # a trial run leaves nothing
    assert "class frequencies are corrected" not in result.out + result.err  # no arm does it twice


@pytest.mark.parametrize(
    "overlays", [["svhn_lt"], ["cifar100_lt", "densenet"]], ids=["svhn_lt", "cifar100_lt with densenet"]
)
def test_a_protocol_without_a_folder_of_arms_trains_a_step_on_other_images(overlays, etflight_command, tmp_path):
    result = etflight_command(
        "fit", "-c", ROOT / "arm/etf_dr_balanced.yaml", *(w for o in overlays for w in ("-c", ROOT / f"data/{o}.yaml")),
        "--data", "ArrayImages", *tiny_signs(tmp_path), "--data.imbalance_ratio", 1, "--data.batch_size", 4, "--trainer.accelerator", "cpu",
        "--trainer.fast_dev_run", "true", cwd=tmp_path,
    )  # fmt: skip
    assert result.status == 0, result.err


@pytest.mark.parametrize("arm", sorted({*POST_HOC, "logit_adjustment"}))
def test_an_arm_without_training_tests_the_checkpoint_of_another_into_a_folder_of_its_own(
    arm, first_stage, etflight_command, tmp_path
):
    test = ["test", "-c", ROOT / f"digits/{arm}.yaml", "--trainer.accelerator", "cpu", "--ckpt_path", first_stage]
    result = etflight_command(*test, cwd=tmp_path)
    assert result.status == 0, result.err
    assert (tmp_path / f"runs/digits/{arm}/test_metrics.json").is_file()
    assert not (first_stage.parent.parent / "test_metrics.json").exists()


@pytest.mark.parametrize("config", OVERLAYS, ids=name)
def test_overlay_composes_with_an_experiment(config, etflight_command, tmp_path):
    result = etflight_command("fit", "-c", ROOT / "digits/ce.yaml", "-c", config, "--print_config", cwd=tmp_path)
    assert result.status == 0, result.err


# The arms of which a variant goes without the mixup of the set's protocol, or with mixup where the protocol has none.
BY_MIXUP = {"ce", "ce_balanced", "balanced_softmax", "ldam_drw", "etf_ce_la", "etf_dr_balanced"}
MIXUP = {"digits": "mixup", "fashion_mnist_lt": "no_mixup", "cifar10_lt": "no_mixup", "cifar100_lt": "no_mixup"}


@pytest.mark.parametrize("dataset", MIXUP)
def test_every_set_has_every_arm_and_arms_differ_in_nothing_else(dataset):
    switch, protocol = MIXUP[dataset], f"../data/{dataset}.yaml"
    experiments = {path.stem: [protocol, f"../arm/{path.name}"] for path in (ROOT / "arm").glob("*.yaml")}
    experiments |= {f"{arm}_{switch}": [*experiments[arm], f"../data/{switch}.yaml"] for arm in BY_MIXUP}
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / dataset).glob("*.yaml")}
    expected = {arm: {"overlays": parts, "name": f"{dataset}/{arm}"} for arm, parts in experiments.items()}
    with_mixup = "ce_mixup" if switch == "mixup" else "ce"
    for arm in SECOND_STAGES:
        first = with_mixup if arm == "mislas" else "ce"
        expected[arm]["fine_tuning"] = {"checkpoint": f"runs/{dataset}/{first}/checkpoints/last.ckpt"}
    if dataset == "cifar100_lt":  # MiSLAS was released with values of its own for it
        smoothing = {"init_args": {"head_smoothing": 0.4, "tail_smoothing": 0.1}}
        expected["label_aware_smoothing"]["model"] = {"loss": smoothing}
        expected["mislas"]["model"] = {"loss": smoothing, "lr_scale": {"head.linear": 0.2}}
        expected["mislas"]["fine_tuning"]["freeze_statistics"] = False
    assert found == expected


# sets with some of the arms only, and what an arm needs there
PHOTOS = {"ce": {}, "balanced_softmax": {}, "etf_dr_balanced": {}}
SOME = {
    "gtsrb": {**PHOTOS, "ce_balanced": {}},
    "imagenet_lt": PHOTOS,
    "places_lt": PHOTOS,
    "cub200": PHOTOS,
    "inat2018": {**PHOTOS, "etf_dr_balanced": {"model": {"head": {"init_args": {"code": "sphere"}}}}},
}


@pytest.mark.parametrize("dataset", SOME)
def test_a_set_with_some_arms_has_no_others_and_they_differ_in_nothing_else(dataset):
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / dataset).glob("*.yaml")}
    assert found == {
        arm: {"overlays": [f"../data/{dataset}.yaml", f"../arm/{arm}.yaml"], "name": f"{dataset}/{arm}", **more}
        for arm, more in SOME[dataset].items()
    }


def test_more_classes_than_dimensions_are_met_by_each_way_out_under_each_loss():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "omniglot").glob("*.yaml")}
    expected = {"ce": {"overlays": ["../data/omniglot.yaml", "../arm/ce.yaml"], "name": "omniglot/ce"}}
    for arm, (way, option) in itertools.product(
        ("etf_dr", "etf_ce"), {"projection": {"projection_dim": 256}, "sphere": {"code": "sphere"}}.items()
    ):
        expected[f"{arm}_{way}"] = {
            "overlays": ["../data/omniglot.yaml", f"../arm/{arm}.yaml"],
            "name": f"omniglot/{arm}_{way}",
            "model": {"head": {"init_args": option}},
        }
    assert found == expected


@pytest.mark.parametrize("dataset", MIXUP)
def test_the_mixup_variant_switches_the_mixup_of_the_protocol(dataset, etflight_command, tmp_path):
    alphas = []
    for arm in ("ce", f"ce_{MIXUP[dataset]}"):
        printed = etflight_command("fit", "-c", ROOT / dataset / f"{arm}.yaml", "--print_config", cwd=tmp_path).out
        alphas.append(yaml.safe_load(printed)["data"]["init_args"]["mixup"])
    assert sorted(alphas) == [0.0, 1.0]
