"""Every shipped YAML is parsed, and run for a step on tiny data of the right shape."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import yaml
from PIL import Image

from tests.large_sets import cub200

ROOT = Path(__file__).parents[2] / "configs"
SETS, ARMS, PROTOCOLS = (sorted((ROOT / folder).glob("*.yaml")) for folder in ("data", "arms", "protocols"))
ADDITIONS = sorted([*(ROOT / "trainer").glob("*.yaml"), *(ROOT / "logger").glob("*.yaml")])
RANDOM = np.random.default_rng(0)


def name(path):
    return str(path.relative_to(ROOT))


def experiment(*parts):
    """`-c` for each file, named as in "data/digits"."""
    return [word for part in parts for word in ("-c", ROOT / f"{part}.yaml")]


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


def tiny_data(name, folder):
    """Arguments for a set, with images of the right shape in its files' layout."""
    match name:
        case "fashion_mnist_lt":
            return [*tiny_fashion(folder), "--data.imbalance_ratio", 2]
        case "cifar10_lt":
            return tiny_cifar(folder, 10)
        case "cifar100_lt":
            return tiny_cifar(folder, 100)
        case "gtsrb" | "gtsrb_lite0":
            return tiny_signs(folder)
        case "svhn_lt" | "stl10_lt":
            return ["--data", "ArrayImages", *tiny_signs(folder), "--data.imbalance_ratio", 1]
        case "omniglot":
            return tiny_characters(folder)
        case "imagenet_lt" | "places_lt" | "inat2018":  # a network of 0.1 instead of 63 M parameters, other images
            return ["--data", "FolderImages", *tiny_folder(folder), "--model.backbone", "test_resnet"]
        case "cub200" | "cub200_scratch":
            cub200(folder / "birds")  # whole: 11,788 links to one file
            size = ["--data.image_size", 32, "--data.num_workers", 0, "--model.backbone", "test_resnet"]
            return ["--data.root", folder / "birds", *size]
        case "folder" | "folder_photos":
            return [*tiny_folder(folder), "--model.backbone", "test_resnet"]
    return []


TRIAL = ["--data.batch_size", 8, "--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true"]
NO_EPOCH = ["--trainer.max_epochs", 0, "--model.lr_scheduler", "null", "--trainer.accelerator", "cpu"]
POST_HOC = {"tau_norm", "ncm"}  # they train nothing


@pytest.fixture(scope="module")
def first_stage(etflight_command, tmp_path_factory):
    """A folder with a run of the arm that second stages start from."""
    cwd = tmp_path_factory.mktemp("first_stage")
    short = ["--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1, "--trainer.accelerator", "cpu"]
    result = etflight_command("fit", *experiment("data/digits", "arms/ce"), *short, cwd=cwd)
    assert result.status == 0, result.err
    assert (cwd / "runs/digits/ce/checkpoints/last.ckpt").is_file()  # called by its files
    return cwd


def assert_trains(result, one_class_a_batch=False):
    assert result.status == 0, result.err
    assert "class frequencies are corrected" not in result.out + result.err  # no arm does it twice
    assert one_class_a_batch or "alignment" in result.out  # every protocol measures neural collapse


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.stem not in POST_HOC], ids=name)
def test_every_arm_trains_a_step(arm, first_stage, etflight_command):
    result = etflight_command("fit", *experiment("data/digits"), "-c", arm, *TRIAL, cwd=first_stage)
    assert_trains(result)
    assert arm.stem == "ce" or not (first_stage / f"runs/digits/{arm.stem}").exists()  # a trial run leaves nothing


@pytest.mark.parametrize("config", SETS, ids=name)
def test_every_set_trains_a_step_in_its_protocol(config, etflight_command, tmp_path):
    frame = ["arms/etf_dr_balanced", "protocols/sphere"] if config.stem in ("omniglot", "inat2018") else ["arms/etf_dr"]
    is_cub = config.stem.startswith("cub200")  # which has more classes than the tiny network has features
    files = ["-c", config, *experiment(*(["arms/ce"] if is_cub else frame))]
    result = etflight_command("fit", *files, *tiny_data(config.stem, tmp_path), *TRIAL, cwd=tmp_path)
    assert_trains(result, one_class_a_batch=is_cub)


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        (["data/cub200", "protocols/fine_tuning", "arms/ce"], tiny_weights),
        (["data/folder_photos", "protocols/fine_tuning", "arms/etf_dr_balanced"], tiny_weights),
        (["data/gtsrb_lite0", "arms/ce", "protocols/lite0_weights"], tiny_weights),
        (["data/cifar100_lt", "protocols/densenet", "arms/etf_dr"], None),
        (["data/digits", "protocols/mixup", "arms/etf_dr_balanced"], None),
        (["data/omniglot", "arms/etf_ce", "protocols/projection"], None),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_protocols_change_what_they_say(parts, options, etflight_command, tmp_path):
    tiny = tiny_data(parts[0].removeprefix("data/"), tmp_path)
    more = [] if options is None else options(tmp_path)
    result = etflight_command("fit", *experiment(*parts), *tiny, *more, *TRIAL, cwd=tmp_path)
    assert_trains(result, one_class_a_batch=parts[0] == "data/cub200")


@pytest.mark.parametrize("arm", sorted({*POST_HOC, "logit_adjustment"}))
def test_an_arm_without_training_tests_the_checkpoint_of_another_into_a_folder_of_its_own(
    arm, first_stage, etflight_command, tmp_path
):
    checkpoint = first_stage / "runs/digits/ce/checkpoints/last.ckpt"
    test = ["test", *experiment("data/digits", f"arms/{arm}"), "--trainer.accelerator", "cpu"]
    result = etflight_command(*test, "--ckpt_path", checkpoint, cwd=tmp_path)
    assert result.status == 0, result.err
    assert (tmp_path / f"runs/digits/{arm}/test_metrics.json").is_file()
    assert not (first_stage / "runs/digits/ce/test_metrics.json").exists()


@pytest.mark.parametrize("config", [*PROTOCOLS, *ADDITIONS], ids=name)
def test_what_can_be_added_composes_with_an_experiment(config, etflight_command, tmp_path):
    files = [*experiment("data/digits", "arms/etf_dr"), "-c", config]
    result = etflight_command("fit", *files, "--print_config", cwd=tmp_path)
    assert result.status == 0, result.err


def test_an_arm_says_nothing_of_the_protocol():
    for arm in ARMS:
        content = yaml.safe_load(arm.read_text())
        second_stage = "first_stage" in content  # which has a short protocol of its own
        allowed = {"model", "data", "trainer", "post_hoc", "fine_tuning", "first_stage"}
        assert content.keys() <= allowed, arm
        assert second_stage or content.get("model", {}).keys() <= {"head", "loss", "logit_adjustment"}, arm
        assert second_stage or content.get("data", {"init_args": {}})["init_args"].keys() <= {"sampler"}, arm
        assert second_stage or content.get("trainer", {}).keys() <= {"callbacks+"}, arm


@pytest.mark.parametrize(
    ("files", "run"),
    [
        (["data/digits", "arms/ce"], "digits/ce"),
        (["data/cifar10_lt", "protocols/short", "arms/ce", "trainer/bf16"], "cifar10_lt_short/ce"),
        (["data/digits", "arms/ce", "protocols/no_mixup", "logger/tensorboard"], "digits/ce_no_mixup"),
        (["arms/etf_ce"], "digits/etf_ce"),
    ],
)
def test_a_run_is_called_by_its_files(files, run, etflight_command, tmp_path):
    options = ["--data", "Digits", "--data.imbalance_ratio", 2, *NO_EPOCH]
    result = etflight_command("fit", *experiment(*files), *options, cwd=tmp_path)
    assert result.status == 0, result.err
    record = json.loads((tmp_path / "runs" / run / "run.json").read_text())
    assert (record["name"], record["arm"]) == (run, run.partition("/")[2])


def test_a_second_stage_finds_its_first_or_says_what_is_missing(first_stage, etflight_command, tmp_path):
    crt = ["fit", *experiment("data/digits", "arms/crt"), *NO_EPOCH]
    result = etflight_command(*crt, cwd=first_stage)
    assert result.status == 0, result.err
    config = yaml.safe_load((first_stage / "runs/digits/crt/config.yaml").read_text())
    assert config["fine_tuning"]["checkpoint"] == "runs/digits/ce/checkpoints/last.ckpt"
    (line,) = etflight_command(*crt, cwd=tmp_path).error_lines
    assert (
        "crt starts from the run of ce, but there is no runs/digits/ce/checkpoints/last.ckpt: train that first" in line
    )
    (line,) = etflight_command(*crt, "--name", "mine", cwd=first_stage).error_lines
    assert "the run mine is not called by its arm crt" in line
    there = ["--fine_tuning.checkpoint", first_stage / "runs/digits/ce/checkpoints/last.ckpt"]
    assert etflight_command(*crt, "--name", "mine", *there, cwd=tmp_path).status == 0


def test_files_that_build_on_others_are_told_to_stand_one_after_another(etflight_command, tmp_path):
    (tmp_path / "mine.yaml").write_text("overlays: [other.yaml]")
    (line,) = etflight_command("fit", "-c", "mine.yaml", "--data", "Digits", cwd=tmp_path).error_lines
    assert "overlays is no option any more: give the files one after another" in line
