"""What a checkpoint knows of its images is what it is used with, or a line says in what it is not."""

import json
from contextlib import redirect_stderr
from io import StringIO

import pytest
import torch
import yaml

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.cli import collapse, export
from etflight.cli.data_option import data_parser
from etflight.cli.stages import main
from etflight.data import ArrayImages, Digits, FolderImages
from etflight.data.preprocessing import Preprocessing
from etflight.data.run_options import prepare_as_trained
from etflight.utils.errors import UserError
from tests import training
from tests.training import image_folder, new_trainer, read_csv, save_arrays, save_folders, save_trained

MEAN, STD = 0.1, 2.0
QUIET = [*training.QUIET, "--trainer.logger", "false"]
OPTIONS = ["--data", "Digits", "--data.max_count", "40"]
OWN = ["--data.mean=[0.1]", "--data.std=[2.0]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with a checkpoint that has seen digits as `(x/255 - 0.1)/2`, which makes a difference to its decisions."""
    short = ["--monitor", "null", "--data.batch_size", 50, "--trainer.max_epochs", 3, "--trainer.logger", "false"]
    run = training.fit_digits(tmp_path_factory.mktemp("run"), *OPTIONS[2:], *OWN, *short)
    checkpoint = str(run / "checkpoints/last.ckpt")
    usual = accuracy(checkpoint, mean=Digits.standard_mean[0], std=Digits.standard_std[0])
    assert abs(accuracy(checkpoint) - usual) > 0.01
    return run


@pytest.fixture
def checkpoint(run):
    return str(run / "checkpoints/last.ckpt")


def told(capsys):
    """Lines about data that are others than those of the training."""
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("etflight: warning:")]


def decided(checkpoint, mean=MEAN, std=STD):
    """Logits of the test images, and their labels, with the normalisation written out."""
    source = Digits().split("test").source
    model = Classifier.load_from_checkpoint(checkpoint).eval()
    with torch.no_grad():
        return model((source.pixels / 255 - mean) / std), source.labels


def accuracy(checkpoint, **normalisation):
    logits, labels = decided(checkpoint, **normalisation)
    return (logits.argmax(1) == labels).double().mean().item()


def evaluated(stage, checkpoint, tmp_path, *argv):
    """Test accuracy of `etflight validate` or `test`: the digits have no validation images of their own."""
    results = ["--trainer.default_root_dir", str(tmp_path), "--name", "results"]
    cli = main([stage, "--ckpt_path", checkpoint, *OPTIONS, *QUIET, *results, *argv])
    return float(cli.trainer.callback_metrics[{"test": "test/acc", "validate": "val/acc"}[stage]])


@pytest.mark.parametrize("stage", ["test", "validate"])
def test_an_evaluation_normalises_as_training_did(stage, checkpoint, tmp_path, capsys):
    assert evaluated(stage, checkpoint, tmp_path) == pytest.approx(accuracy(checkpoint))
    assert told(capsys) == []
    if stage == "test":  # whose record says so
        arguments = yaml.safe_load((tmp_path / "results/config.yaml").read_text())["data"]["init_args"]
        assert (arguments["mean"], arguments["std"]) == ([MEAN], [STD])


def test_predictions_and_collapse_are_those_of_images_normalised_as_training_did(checkpoint, tmp_path, capsys):
    main(["predict", "--ckpt_path", checkpoint, *OPTIONS, *QUIET, "--output", str(tmp_path / "p.csv")])
    found = [int(row["class"]) for row in read_csv(tmp_path / "p.csv")]
    assert found == decided(checkpoint)[0].argmax(1).tolist()
    collapse.main([checkpoint, *OPTIONS, "--output", str(tmp_path)])
    record = json.loads((tmp_path / "collapse.json").read_text())
    assert record["test"]["acc"] == pytest.approx(accuracy(checkpoint))
    assert told(capsys) == []


@pytest.mark.parametrize("place", ["command line", "file"])
def test_what_the_user_gives_wins_and_is_told_in_one_line(place, checkpoint, tmp_path, capsys):
    given = ["--data.mean=[0.3]"]  # and leaves the other one to the checkpoint
    if place == "file":
        (tmp_path / "own.yaml").write_text("data: {class_path: Digits, init_args: {mean: [0.3], std: null}}")
        given = ["-c", str(tmp_path / "own.yaml")]
    assert evaluated("test", checkpoint, tmp_path, *given) == pytest.approx(accuracy(checkpoint, mean=0.3))
    assert told(capsys) == [
        "etflight: warning: Digits: images are prepared differently than in training: mean [0.3] instead of [0.1]"
    ]


def test_exported_models_want_what_the_checkpoint_wants_unless_the_user_says_otherwise(checkpoint, tmp_path, capsys):
    for name, argv, mean, lines in (
        ("alone", [], MEAN, 0),
        ("with its data", OPTIONS, MEAN, 0),
        ("as the user says", [*OPTIONS, "--data.mean=[0.3]"], 0.3, 1),
    ):
        export.main([checkpoint, "--output", str(tmp_path / name), *argv])
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["pretrained_cfg"]["mean"] == [mean], name
        assert len(told(capsys)) == lines, name


def test_held_out_images_of_another_choice_may_have_been_trained_on_which_is_told(checkpoint, tmp_path, capsys):
    evaluated("validate", checkpoint, tmp_path, "--data.val_fraction=0.1")
    (line,) = told(capsys)
    assert "has other training images" in line


def test_test_images_of_another_draw_may_have_been_trained_on_which_is_told(tmp_path, capsys):
    save_folders(tmp_path / "pets", **{".": {"cat": 4, "dog": 4}})
    model = Classifier(2, "resnet20_cifar", head=LinearHead, loss=CrossEntropyLoss)
    trained_on = FolderImages(str(tmp_path / "pets"), image_size=8, batch_size=4)
    save_trained(tmp_path / "m.ckpt", model, trained_on, limit_train_batches=0)
    test = ["test", "--ckpt_path", str(tmp_path / "m.ckpt"), "--data.root", str(tmp_path / "pets"), *QUIET]
    for name, given, lines in (("same", [], 0), ("other", ["--data.test_fraction", "0.5"], 1)):
        cli = main([*test, *given, "--trainer.default_root_dir", str(tmp_path), "--name", name])
        assert isinstance(cli.datamodule, FolderImages)  # without its name
        assert len([line for line in told(capsys) if "training images" in line]) == lines


def test_weights_taken_from_a_checkpoint_are_told_of_another_normalisation(checkpoint, tmp_path, capsys):
    part = ["--fine_tuning.checkpoint", checkpoint, "--fine_tuning.load", "{backbone: backbone}", "--monitor", "null"]
    fit = ["fit", *OPTIONS, "--model.backbone", "resnet20_cifar", *QUIET, "--trainer.default_root_dir", str(tmp_path)]
    for name, given, lines in (("same", OWN, 0), ("other", [], 1)):
        main([*fit, *part, *given, "--name", name, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1"])
        assert len(told(capsys)) == lines


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ([], None),
        (["--data.image_size=10"], "10×10 pixels instead of 12×12 pixels"),
        (["--data.crop_pct=1"], "crop_pct 1.0 instead of 0.75"),
    ],
)
def test_pictures_are_sized_and_cropped_as_training_did(given, line, tmp_path, capsys):
    image_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
    model = Classifier(2, "resnet20_cifar", head=LinearHead, loss=CrossEntropyLoss)
    trained_on = FolderImages(str(tmp_path / "pets"), image_size=12, crop_pct=0.75, batch_size=4)
    save_trained(tmp_path / "m.ckpt", model, trained_on, limit_train_batches=0)
    data = ["--data", "FolderImages", "--data.root", str(tmp_path / "pets")]
    place = ["--trainer.default_root_dir", str(tmp_path), "--name", "t"]
    cli = main(["test", "--ckpt_path", str(tmp_path / "m.ckpt"), *data, *given, *QUIET, *place])
    known = Preprocessing((3, 12, 12), (0.5,) * 3, (0.5,) * 3, 0.75)
    assert (cli.datamodule.preprocessing == known) is (line is None)
    assert [text.rpartition("training: ")[2] for text in told(capsys)] == ([] if line is None else [line])


def test_a_subset_of_pictures_is_sized_as_training_did(tmp_path):
    image_folder(tmp_path / "pets", {"cat": 4, "dog": 4, "emu": 4})
    known = Preprocessing((3, 12, 12), (0.5,) * 3, (0.25,) * 3, 0.75)
    parser = data_parser("describe", "")
    words = [
        "--data=ClassSubset",
        "--data.images=FolderImages",
        f"--data.images.root={tmp_path / 'pets'}",
        "--data.classes=0-1",
    ]
    config = parser.parse_args(words)
    prepare_as_trained(config.data, known)
    assert parser.instantiate(config).data.preprocessing == known


def test_results_of_pictures_of_another_size_do_not_replace_those_of_the_training(tmp_path, capsys):
    image_folder(tmp_path / "pets", {"cat": 4, "dog": 4})
    model = Classifier(2, "resnet20_cifar", head=LinearHead, loss=CrossEntropyLoss)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "metrics.csv").touch()
    trained_on = FolderImages(str(tmp_path / "pets"), image_size=12, batch_size=4)
    save_trained(run / "checkpoints/last.ckpt", model, trained_on, limit_train_batches=0)
    data = ["--data", "FolderImages", "--data.root", str(tmp_path / "pets")]
    words = ["test", "--ckpt_path", str(run / "checkpoints/last.ckpt"), *data, *QUIET]
    for _ in range(2):  # the same test again replaces its results
        main(words)
        results = (run / "test_metrics.json").read_bytes()
    with pytest.raises(
        UserError, match=r"10×10 pixels instead of 12×12 pixels; the results in .*run stay as they are: give"
    ):
        main([*words, "--data.image_size=10"])
    assert (run / "test_metrics.json").read_bytes() == results
    main([*words, "--data.image_size=10", "--trainer.default_root_dir", str(tmp_path), "--name", "other"])
    assert (tmp_path / "other/test_metrics.json").is_file()


# --- as a library ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_loaded_model_warns_once_of_data_that_are_prepared_otherwise(stage, checkpoint, capsys):
    model = Classifier.load_from_checkpoint(checkpoint)
    for data, lines in ((Digits(), 1), (Digits(mean=[MEAN], std=[STD]), 0)):
        getattr(new_trainer(), stage)(model, datamodule=data)
        assert len(told(capsys)) == lines
    getattr(new_trainer(), stage)(model, datamodule=Digits(), ckpt_path=checkpoint, weights_only=True)
    assert len(told(capsys)) == 1


def test_training_a_loaded_model_on_is_told_of_another_normalisation_and_resuming_it_is_refused(checkpoint, capsys):
    new_trainer(fast_dev_run=True).fit(Classifier.load_from_checkpoint(checkpoint), datamodule=Digits(max_count=40))
    assert len(told(capsys)) == 1
    for data, reason in (
        (Digits(max_count=40), r"prepared differently than in training: .*mean \[.*"),
        (Digits(max_count=41, mean=[MEAN], std=[STD]), "41 training images of class 0, but the checkpoint was trained on 40"),
        (Digits(max_count=40, seed=1, mean=[MEAN], std=[STD]), "has other training images"),
    ):  # fmt: skip
        model = Classifier(10, "resnet20_cifar", in_chans=1)
        with pytest.raises(UserError, match=f"{reason}.*data options"):
            new_trainer(max_epochs=4).fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)


def tell_of_other_data(rank, checkpoint):
    model, trainer = Classifier.load_from_checkpoint(checkpoint), new_trainer(devices=2, strategy="ddp")
    with redirect_stderr(StringIO()) as printed:
        trainer.test(model, datamodule=Digits(), verbose=False)
    return printed.getvalue().count("prepared differently")


def test_of_several_processes_the_first_one_tells_it(checkpoint, two_ready_processes):
    assert two_ready_processes(tell_of_other_data, [(checkpoint,)] * 2) == [1, 0]


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def of_channels(tmp_path_factory):
    """Checkpoints of models of grey and of RGB images."""
    root = tmp_path_factory.mktemp("channels")
    for channels in (1, 3):
        save_arrays(root / f"{channels}.npz", shape=(8, 8, channels))
        data, model = ArrayImages(str(root / f"{channels}.npz")), Classifier(10, "resnet20_cifar", in_chans=channels)
        save_trained(root / f"{channels}.ckpt", model, data, limit_train_batches=0)
    return root


def test_images_of_other_channels_are_refused_with_both_numbers_and_the_mend(of_channels, tmp_path):
    path, other = str(of_channels / "1.ckpt"), str(of_channels / "3.npz")
    data, output = ["--data", "ArrayImages", "--data.path", other], ["--output", str(tmp_path / "out")]
    place = [*QUIET, "--trainer.default_root_dir", str(tmp_path), "--name", "r", "--ckpt_path", path]
    for command, argv in (
        (main, ["test", *data, *place]),
        (main, ["fit", *data, *place]),
        (collapse.main, [path, *data, *output]),
        (export.main, [path, *data, *output]),
    ):
        with pytest.raises(UserError) as refused:
            command(argv)
        assert str(refused.value) == (
            f"checkpoint {path} takes images of 1 channel, but ArrayImages {other} has 3: give the data it was trained on"
        )
    assert list(tmp_path.rglob("*.*")) == []


def test_a_model_built_for_other_classes_or_channels_than_the_data_have_is_refused_in_python_too():
    for model, reason in (
        (Classifier(10, "resnet20_cifar"), "the model takes images of 3 channels, but Digits has 1"),
        (Classifier(7, "resnet20_cifar", in_chans=1), "the model decides between 7 classes, but Digits has 10"),
    ):
        for stage in ("fit", "predict"):
            with pytest.raises(UserError, match=reason):
                getattr(new_trainer(), stage)(model, datamodule=Digits())


@pytest.mark.parametrize("stage", ["test", "validate", "predict"])
def test_a_model_warns_of_arrays_of_another_size_than_those_it_was_trained_on(stage, tmp_path, capsys):
    for side in (8, 12):
        save_arrays(tmp_path / f"{side}.npz", shape=(side, side))
    model = Classifier(10, "test_resnet", head=LinearHead, loss=CrossEntropyLoss, in_chans=1)
    new_trainer(fast_dev_run=True).fit(model, datamodule=ArrayImages(str(tmp_path / "8.npz")))
    getattr(new_trainer(), stage)(model, datamodule=ArrayImages(str(tmp_path / "12.npz")))
    (line,) = told(capsys)
    assert line.endswith("images are prepared differently than in training: 12×12 pixels instead of 8×8 pixels")
