"""Every shipped YAML: arms and sets train a step on tiny data, or come as far as the files they need; the rest composes."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import timm
import yaml

from tests.training import save_arrays, save_folders

ROOT = Path(__file__).parents[2] / "configs"
SETS, ARMS = (sorted((ROOT / folder).glob("*.yaml")) for folder in ("data", "arms"))
ADDITIONS = sorted(path for folder in ("protocols", "trainer", "logger") for path in (ROOT / folder).glob("*.yaml"))
POST_HOC = {"tau_norm", "ncm"}  # they train nothing
# their files tell the classes
OF_FILES = {"folder", "folder_photos", "gtsrb", "gtsrb_lite0", "gtsrb_sessions", "omniglot", "omniglot_sessions"}
OF_PHOTOGRAPHS = {"imagenet_lt", "places_lt", "inat2018", "cub200", "cub200_scratch"}
CPU = ["--trainer.accelerator", "cpu"]
TRIAL = [*CPU, "--data.batch_size", 8, "--trainer.fast_dev_run", "true"]
NO_EPOCH = [*CPU, "--trainer.max_epochs", 0, "--model.lr_scheduler", "null"]


def name(path):
    return str(path.relative_to(ROOT))


def experiment(*parts):
    """`-c` for each file, named as in "data/digits"."""
    return [word for part in parts for word in ("-c", ROOT / f"{part}.yaml")]


def tiny_data(name, folder):
    """Arguments for a set of files, with images of the right shape in its files' layout."""
    if name.startswith("folder"):
        four = {"cat": 4, "dog": 4}
        save_folders(folder / "images", (32, 40), train=four, test=four)
        small = ["--data.image_size", 32, "--data.num_workers", 0, "--model.backbone", "test_resnet"]
        return ["--data.root", folder / "images", *small]
    shape, classes = ((28, 28), 242) if name.startswith("omniglot") else ((32, 32, 3), 43)
    save_arrays(folder / "images.npz", train=2 * classes, test=8, shape=shape, classes=classes)
    return [f"--data{'.images' * is_base_session(name)}.path", folder / "images.npz"]


def is_base_session(name):
    """Whether a set is the base session of class-incremental learning, some classes of another set."""
    return name.endswith("_sessions")


@pytest.fixture(scope="module")
def first_stage(etflight_command, tmp_path_factory):
    """A folder with runs of the arms that second stages start from."""
    cwd = tmp_path_factory.mktemp("first_stage")
    short = [*CPU, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1]
    for arm in ("ce", "etf_ce"):
        etflight_command("fit", *experiment("data/digits", f"arms/{arm}"), *short, cwd=cwd).ran()
    return cwd


def assert_trains(result):
    result.ran()
    assert "class frequencies are corrected" not in result.out + result.err  # no arm does it twice
    assert "alignment" in result.out  # every protocol measures neural collapse


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm.stem not in POST_HOC], ids=name)
def test_every_arm_trains_a_step(arm, first_stage, etflight_command):
    result = etflight_command("fit", *experiment("data/digits"), "-c", arm, *TRIAL, cwd=first_stage)
    assert_trains(result)
    if arm.stem not in ("ce", "etf_ce"):
        assert not (first_stage / f"runs/digits/{arm.stem}").exists()  # a trial run leaves nothing


@pytest.mark.parametrize("config", SETS, ids=name)
def test_every_set_trains_a_step_in_its_protocol_or_makes_its_network_and_misses_its_images(
    config, etflight_command, tmp_path
):
    argv = ["fit", "-c", config, *TRIAL]
    if config.stem in OF_FILES or config.stem.startswith("digits"):
        images = tiny_data(config.stem, tmp_path) if config.stem in OF_FILES else []
        frame = ["arms/etf_dr_balanced", "protocols/sphere"] if config.stem == "omniglot" else ["arms/etf_dr"]
        frame = ["arms/etf_dr_reserved"] if is_base_session(config.stem) else frame
        assert_trains(etflight_command(*argv, *experiment(*frame), *images, cwd=tmp_path))
        return
    small = ["--model.backbone", "test_resnet"] if config.stem in OF_PHOTOGRAPHS else []
    root = [f"--data{'.images' * is_base_session(config.stem)}.root", "nowhere"]
    result = etflight_command(*argv, *experiment("arms/ce"), *small, *root, cwd=tmp_path)
    if result.status != 0:  # else a package of this machine has them
        (line,) = result.error_lines
        assert "nowhere" in line or "_train.txt cannot be read (No such file" in line


@pytest.mark.parametrize(
    ("parts", "has_weights"),
    [
        (["data/folder_photos", "protocols/fine_tuning", "arms/etf_dr_balanced"], True),
        (["data/gtsrb_lite0", "arms/ce", "protocols/lite0_weights"], True),
        (["data/omniglot", "arms/etf_ce", "protocols/projection"], False),
    ],
    ids=["fine_tuning", "lite0_weights", "projection"],
)
def test_protocols_that_need_files_or_sets_of_their_own_train(parts, has_weights, etflight_command, tmp_path):
    argv = [*tiny_data(parts[0].removeprefix("data/"), tmp_path), *TRIAL]
    if has_weights:
        file = tmp_path / "weights.safetensors"
        safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), file)
        argv += ["--model.backbone", "test_resnet", "--fine_tuning.weights", file]
    assert_trains(etflight_command("fit", *experiment(*parts), *argv, cwd=tmp_path))


def test_an_arm_without_training_tests_the_checkpoint_of_another_into_a_folder_of_its_own(
    first_stage, etflight_command, tmp_path
):
    checkpoint = first_stage / "runs/digits/ce/checkpoints/last.ckpt"
    for arm in (*sorted(POST_HOC), "logit_adjustment"):
        test = ["test", *experiment("data/digits", f"arms/{arm}"), *CPU, "--ckpt_path", checkpoint]
        etflight_command(*test, cwd=tmp_path).ran()
        assert (tmp_path / f"runs/digits/{arm}/test_metrics.json").is_file()
    assert not (first_stage / "runs/digits/ce/test_metrics.json").exists()


@pytest.mark.parametrize("config", ADDITIONS, ids=name)
def test_what_can_be_added_composes_with_an_experiment(config, etflight_command, tmp_path):
    files = [*experiment("data/digits", "arms/etf_dr"), "-c", config]
    etflight_command("fit", *files, "--print_config", cwd=tmp_path).ran()


def test_an_arm_says_nothing_of_the_protocol():
    for arm in ARMS:
        content = yaml.safe_load(arm.read_text())
        second_stage = "first_stage" in content  # which has a short protocol of its own
        allowed = {"model", "data", "trainer", "post_hoc", "fine_tuning", "first_stage"}
        assert content.keys() <= allowed, arm
        assert second_stage or content.get("model", {}).keys() <= {"head", "loss", "logit_adjustment", "sam_rho"}, arm
        assert second_stage or content.get("data", {"init_args": {}})["init_args"].keys() <= {"sampler"}, arm
        assert second_stage or content.get("trainer", {}).keys() <= {"callbacks+"}, arm


@pytest.mark.parametrize(
    ("files", "run"),
    [
        (["data/cifar10_lt", "protocols/short", "arms/ce", "trainer/bf16"], "cifar10_lt_short/ce"),
        (["data/digits", "arms/ce", "protocols/no_mixup", "logger/tensorboard"], "digits/ce_no_mixup"),
        (["arms/etf_ce"], "digits/etf_ce"),
    ],
)
def test_a_run_is_called_by_its_files(files, run, etflight_command, tmp_path):
    options = ["--data", "Digits", "--data.imbalance_ratio", 2, *NO_EPOCH]
    etflight_command("fit", *experiment(*files), *options, cwd=tmp_path).ran()
    record = json.loads((tmp_path / "runs" / run / "run.json").read_text())
    assert (record["name"], record["arm"]) == (run, run.partition("/")[2])


def test_a_second_stage_goes_on_and_is_tested_by_its_own_files_without_the_first(etflight_command, tmp_path):
    short = [*CPU, "--trainer.limit_train_batches", 3, "--trainer.limit_val_batches", 1, "--trainer.max_epochs", 1]
    etflight_command("fit", *experiment("data/digits", "arms/ce"), *short, cwd=tmp_path).ran()
    crt = experiment("data/digits", "arms/crt")
    fit = ["fit", *crt, *short, "--checkpoint.every_n_steps", 1]
    kill = ["--trainer.callbacks+=tests.left_by_runs.Kill", "--trainer.callbacks.after", 1]
    assert etflight_command(*fit, *kill, cwd=tmp_path).status == -9
    first, own = (tmp_path / f"runs/digits/{arm}" for arm in ("ce", "crt"))
    (first / "checkpoints/last.ckpt").unlink()
    assert "Restored all states" in etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path).ran().err
    config = yaml.safe_load((own / "config.yaml").read_text())
    assert config["fine_tuning"]["checkpoint"] == "runs/digits/ce/checkpoints/last.ckpt"
    etflight_command("test", *crt, *CPU, "--ckpt_path", "last", cwd=tmp_path).ran()
    assert (own / "test_metrics.json").is_file()


def test_a_second_stage_finds_its_first_or_says_what_is_missing(first_stage, etflight_command, tmp_path):
    crt = ["fit", *experiment("data/digits", "arms/crt"), *NO_EPOCH]
    checkpoint = "runs/digits/ce/checkpoints/last.ckpt"
    etflight_command(*crt, cwd=first_stage).ran()
    config = yaml.safe_load((first_stage / "runs/digits/crt/config.yaml").read_text())
    assert config["fine_tuning"]["checkpoint"] == checkpoint
    missing = f"crt starts from the run of ce, but there is no {checkpoint}: train that first"
    etflight_command(*crt, cwd=tmp_path).assert_refused(missing)
    mine = etflight_command(*crt, "--name", "mine", cwd=first_stage)
    mine.assert_refused("there is no runs/mine/checkpoints/last.ckpt", "--fine_tuning.checkpoint FILE")
    there = ["--fine_tuning.checkpoint", first_stage / checkpoint]
    assert etflight_command(*crt, "--name", "mine", *there, cwd=tmp_path).status == 0
