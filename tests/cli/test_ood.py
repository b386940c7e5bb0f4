import json
import re
import shutil
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from etflight import Classifier, LinearHead, __main__
from etflight.backbones.cifar import CifarNet
from etflight.cli import ood
from etflight.data import ArrayImages, Digits
from etflight.losses import CrossEntropyLoss
from etflight.metrics import ClassStatistics, measures
from etflight.metrics import ood as scores
from etflight.utils.errors import UserError
from tests import training

DATA = ["--data.imbalance_ratio=20", "--data.max_count=40", "--data.std=[0.25]"]
SHORT = ["--monitor=null", "--trainer.max_epochs=1"]
OF_EMBEDDING = {
    "msp",
    "max_logit",
    "energy",
    "largest_cosine",
    "span_norm",
    "mahalanobis",
    "knn",
    "neco",
    "neco_max_logit",
}
RAW = {"mahalanobis_raw", "knn_raw", "neco_raw", "neco_max_logit_raw"}


def fit(words: list[str]) -> None:
    from etflight.cli.stages import main  # here, as in `tests.training`

    main(["fit", *words])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a frame trained on digits at ratio 20, with a normalisation of its own."""
    return training.fit_digits(tmp_path_factory.mktemp("runs"), *DATA, *SHORT, "--seed_everything=3")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise of the digits' size, as an .npz file."""
    path = tmp_path_factory.mktemp("images") / "noise.npz"
    training.save_arrays(path, train=8, test=30, shape=(8, 8), classes=2)
    return path


def arrays(path: Path, *words: str) -> list[str]:
    return ["--data=ArrayImages", f"--data.path={path}", *words]


def record(folder: Path) -> dict:
    return json.loads((folder / "ood.json").read_text())


@pytest.fixture(scope="module")
def printed(run: Path, noise: Path) -> str:
    """What the command prints of the run and the noise."""
    with redirect_stdout(StringIO()) as out:
        ood.main([str(run), *arrays(noise)])
    return out.getvalue()


def test_numbers_are_those_computed_from_scratch_and_by_scikit_learn(run, noise, printed):
    found = record(run / "ood" / "noise")
    model = Classifier.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    known = Digits(imbalance_ratio=20, max_count=40, std=[0.25])
    unknown = ArrayImages(path=str(noise), mean=list(Digits.standard_mean), std=[0.25])  # as the run
    functions = model.features, model.embed, model
    train, test = (training.seen(known, split, *functions) for split in ("train", "test"))
    others = training.seen(unknown, "test", *functions)
    weight, T = model.head.weight, float(model.temperature)
    k = min(known.class_counts)
    spaces = {}
    for end, column in (("", 1), ("_raw", 0)):
        statistics = ClassStatistics(10, 64)
        statistics.update(train[column], train[3])
        stats, subspace = statistics.compute(), scores.principal_subspace(train[column], 9)
        spaces |= {
            f"mahalanobis{end}": lambda out, c=column, s=stats: scores.mahalanobis(out[c], s),
            f"knn{end}": lambda out, c=column: scores.knn(out[c], train[c], k),
            f"neco{end}": lambda out, c=column, s=subspace: scores.neco(out[c], s),
            f"neco_max_logit{end}": lambda out, c=column, s=subspace: scores.neco(out[c], s) * out[2].max(1).values,
        }
        assert found[f"nc5{end}"] == pytest.approx(
            measures.nc5(stats, others[column].double().mean(0)).item(), rel=1e-5
        )
    expected = spaces | {
        "msp": lambda out: (out[2] / T).softmax(1).max(1).values,
        "max_logit": lambda out: out[2].max(1).values,
        "energy": lambda out: T * logsumexp(out[2].double().numpy() / T, axis=1),
        "largest_cosine": lambda out: torch.cosine_similarity(out[1][:, None], weight, dim=2).max(1).values,
        "span_norm": lambda out: scores.span_norm(out[1], weight),
    }
    assert found["scores"].keys() == expected.keys() == OF_EMBEDDING | RAW
    for name, score in expected.items():
        both = [np.asarray(score(out), dtype=float) for out in (test, others)]
        is_known, values = np.r_[np.ones(len(both[0])), np.zeros(len(both[1]))], np.concatenate(both)
        own = found["scores"][name]
        # images in batches of another size are computed with other float32 steps, which swaps neighbours
        assert own["auroc"] == pytest.approx(roc_auc_score(is_known, values), abs=2e-4), name
        assert own["aupr_known"] == pytest.approx(average_precision_score(is_known, values), abs=2e-4), name
        assert own["aupr_unknown"] == pytest.approx(average_precision_score(1 - is_known, -values), abs=2e-3), name
        assert 0 <= own["fpr95"] <= 1
        assert f"{100 * own['auroc']:.1f}" in printed


def test_stored_features_give_the_same_numbers_and_are_not_computed_again(run, noise, printed, tmp_path, monkeypatch):
    words = [str(run), *arrays(noise), "--features", str(tmp_path / "features")]
    ood.main([*words, "--output", str(tmp_path / "first")])
    stores = training.written(tmp_path / "features")
    assert stores.keys() == {"train.safetensors", "test.safetensors", "noise/test.safetensors"}
    monkeypatch.setattr(CifarNet, "forward", None)  # nothing may call it
    ood.main([*words, "--output", str(tmp_path / "second")])
    assert training.written(tmp_path / "features") == stores
    plain = record(run / "ood" / "noise")["scores"]
    for found in (record(tmp_path / "first")["scores"], record(tmp_path / "second")["scores"]):
        for name, score in plain.items():
            assert found[name]["auroc"] == pytest.approx(score["auroc"], abs=2e-4)


def test_the_record_says_what_was_compared(run, noise, printed):
    found = record(run / "ood" / "noise")
    known = Digits(imbalance_ratio=20, max_count=40)
    counts = known.class_counts.tolist()
    assert found["known"] == {
        "class": "Digits",
        "dataset": "Digits",
        "fingerprint": known.fingerprint,
        "class_counts": counts,
        "train_images": sum(counts),
        "test_images": len(known.split("test")),
    }
    content = found["unknown"].pop("content")
    assert re.fullmatch("[0-9a-f]{12}", content)
    assert found["unknown"] == {
        "class": "ArrayImages",
        "dataset": "noise",
        "folder": None,
        "image_shape": [1, 8, 8],
        "crop_pct": 1.0,
        "adapted": False,
        "test_images": 30,
        "shared_classes": [],
    }
    assert (found["seed"], found["k"], found["components"], found["left_out"]) == (3, min(counts), 9, {})
    assert found["model"] == f"checkpoint {run / 'checkpoints' / 'last.ckpt'}"
    assert {path.name for path in (run / "ood" / "noise").iterdir()} == {"ood.json", "histograms.png"}


def test_each_unknown_set_has_a_folder_and_a_checkpoint_counts_as_its_run(run, noise, tmp_path, printed):
    shutil.copy(noise, tmp_path / "other set.npz")
    ood.main([str(run / "checkpoints" / "last.ckpt"), *arrays(tmp_path / "other set.npz")])
    assert record(run / "ood" / "other_set")["scores"] == record(run / "ood" / "noise")["scores"]


def test_labels_and_normalisation_of_the_unknown_set_do_not_count(run, noise, tmp_path, printed):
    with np.load(noise) as content:
        changed = {**content, "test_labels": content["test_labels"][::-1]}
    np.savez(tmp_path / "noise.npz", **changed)
    ood.main([str(run), *arrays(tmp_path / "noise.npz", "--data.mean=[0.9]", "--output", str(tmp_path))])
    assert record(tmp_path)["scores"] == record(run / "ood" / "noise")["scores"]


def test_k_and_components_change_only_their_scores(run, noise, tmp_path, printed):
    ood.main([str(run), *arrays(noise), "--k=1", "--components=2", "--output", str(tmp_path)])
    own, usual = record(tmp_path), record(run / "ood" / "noise")
    assert (own["k"], own["components"]) == (1, 2)
    changed = {name for name in own["scores"] if own["scores"][name] != usual["scores"][name]}
    assert {"knn", "neco"} <= changed <= {"knn", "neco", "neco_max_logit", *RAW} - {"mahalanobis_raw"}


def test_images_of_another_size_and_other_channels_are_adapted_on_demand_only(run, tmp_path):
    training.save_arrays(tmp_path / "large.npz", test=12, shape=(20, 24, 3), classes=2)
    with pytest.raises(UserError, match=r"images of 3×20×24 .* but the model takes 1×8×8: give --adapt true to resize"):
        ood.main([str(run), *arrays(tmp_path / "large.npz")])
    ood.main([str(run), *arrays(tmp_path / "large.npz", "--adapt=true", "--output", str(tmp_path))])
    assert record(tmp_path)["unknown"]["adapted"] is True
    assert record(tmp_path)["unknown"]["image_shape"] == [3, 20, 24]


def test_held_out_classes_of_the_same_set_are_unknown_and_the_runs_own_test_images_are_refused(tmp_path, capsys):
    words = ["--data=ClassSubset", "--data.images=Digits", "--data.classes"]
    own = [
        "--trainer.default_root_dir",
        str(tmp_path),
        "--name=r",
        *training.QUIET,
        *SHORT,
        "--model.backbone=resnet20_cifar",
    ]
    fit([*words, "0-5", *own])
    run = tmp_path / "r"
    ood.main([str(run), *words, "6-9"])
    assert record(run / "ood" / "Digits_6-9")["unknown"]["shared_classes"] == []
    for classes in ("5-6", "0-5"):
        with pytest.raises(UserError, match=f"classes {classes} of Digits holds test images of the run itself"):
            ood.main([str(run), *words, classes])


def test_classes_of_the_same_name_are_told_in_one_line(tmp_path, capsys):
    training.save_folders(tmp_path / "known", train={"cat": 4, "dog": 4}, test={"cat": 2, "dog": 2})
    training.save_folders(tmp_path / "unknown", train={"Dog": 2, "emu": 2}, test={"Dog": 2, "emu": 2})
    words = ["--data=FolderImages", "--data.image_size=8"]
    model = ["--model.backbone=resnet20_cifar", "--trainer.default_root_dir", str(tmp_path), "--name=r"]
    fit([*words, f"--data.root={tmp_path / 'known'}", *model, *training.QUIET, *SHORT])
    capsys.readouterr()
    ood.main([str(tmp_path / "r"), "--data=FolderImages", f"--data.root={tmp_path / 'unknown'}"])
    (told,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told.endswith("is taken as unknown, but the model knows classes of these names: Dog")
    assert set(record(tmp_path / "r" / "ood" / "unknown")["unknown"]["shared_classes"]) == {"Dog"}


def test_more_components_than_pooled_features_leave_the_embeddings_score(tmp_path, noise):
    run = training.fit_digits(tmp_path, *DATA, *SHORT, "--model.head=ETFHead", "--model.head.projection_dim=100")
    ood.main([str(run), *arrays(noise), "--components=80"])
    found = record(run / "ood" / "noise")
    assert "neco" in found["scores"]
    assert found["left_out"]["neco_raw"].startswith("80 components leave none of 64 dimensions out")


def test_scores_that_mean_nothing_are_left_out_and_one_space_is_measured_once(tmp_path, noise, capsys):
    """A learned head whose class vectors span all that its features can be."""
    head = ["--model.head=ETFHead", "--model.head.projection_dim=9"]
    run = training.fit_digits(tmp_path, *DATA, *SHORT, *head)
    ood.main([str(run), *arrays(noise)])
    found = record(run / "ood" / "noise")
    assert found["left_out"].keys() == {"span_norm", "neco", "neco_max_logit"}
    assert found["scores"].keys() == (OF_EMBEDDING | RAW) - {"span_norm", "neco", "neco_max_logit"}
    out = capsys.readouterr().out
    assert "span_norm is left out: 10 class vectors span all 9 dimensions" in out
    plain = ["--model.head=LinearHead", "--model.loss=CrossEntropyLoss", "--name=plain"]
    training.fit_digits(tmp_path, *DATA, *SHORT, *plain)
    ood.main([str(tmp_path / "plain"), *arrays(noise)])
    assert record(tmp_path / "plain" / "ood" / "noise")["scores"].keys() == OF_EMBEDDING


class Vectorless(LinearHead):
    """One of the user's own, which keeps its class vectors to itself."""

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.inner = self.weight
        del self.weight

    def logits(self, embedding: Tensor) -> Tensor:
        return embedding @ self.inner.T


def test_a_model_without_class_vectors_is_refused_in_one_line(run, noise, tmp_path):
    model = Classifier(10, "resnet20_cifar", in_chans=1, head=Vectorless, loss=CrossEntropyLoss)
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    model.on_save_checkpoint(checkpoint)
    (tmp_path / "r" / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "config.yaml", tmp_path / "r")
    torch.save(checkpoint, tmp_path / "r" / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"head Vectorless of checkpoint .* has no class vectors weight \[K, d\]"):
        ood.main([str(tmp_path / "r"), *arrays(noise)])


def test_results_of_other_images_or_options_are_not_replaced(run, noise, tmp_path):
    folder = tmp_path / "results"
    words = [str(run), f"--output={folder}"]
    (tmp_path / "b").mkdir()
    training.save_arrays(other := tmp_path / "b" / "noise.npz", train=8, test=12, shape=(8, 8), classes=2)
    for _ in range(2):  # the same once more
        ood.main([*words, *arrays(noise)])
    before = (folder / "ood.json").read_bytes()
    for given, message in ((arrays(other), "unknown content: .*, not .*"), (arrays(noise, "--k=3"), "k: 2, not 3")):
        with pytest.raises(UserError, match=f"holds other results .{message}.*give --output"):
            ood.main([*words, *given])
    assert (folder / "ood.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "histograms.png").write_text("mine")
    with pytest.raises(UserError, match=r"histograms\.png has no ood\.json beside it.*give another --output"):
        ood.main([str(run), *arrays(noise), f"--output={tmp_path / 'mine'}"])


def test_files_of_the_same_names_in_other_folders_are_other_images(tmp_path):
    """As the corruptions of one set are laid out, a folder for each."""
    places = [tmp_path / name / "3" for name in ("own", "fog", "blur")]
    for place in places:
        training.save_folders(place, train={"a": 3, "b": 3}, test={"a": 2, "b": 2})
    words = [["--data=FolderImages", "--data.image_size=8", f"--data.root={place}"] for place in places]
    own = ["--model.backbone=resnet20_cifar", "--trainer.default_root_dir", str(tmp_path), "--name=r"]
    fit([*words[0], *own, *training.QUIET, *SHORT])
    run = str(tmp_path / "r")
    with pytest.raises(UserError, match="holds test images of the run itself"):
        ood.main([run, *words[0]])
    ood.main([run, *words[1]])
    with pytest.raises(UserError, match=r"holds other results .unknown folder: .*fog/3, not .*blur/3"):
        ood.main([run, *words[2]])
    with pytest.raises(UserError, match=r"holds other results .unknown crop_pct: 1.0, not 0.5"):
        ood.main([run, *words[1], "--data.crop_pct=0.5"])


def test_images_of_the_run_that_have_moved_are_told_as_the_runs_own(noise, tmp_path):
    training.save_arrays(tmp_path / "own.npz", shape=(8, 8))
    data = ["--data", "ArrayImages", "--data.path", str(tmp_path / "own.npz")]
    place = ["--trainer.default_root_dir", str(tmp_path), "--name", "own", *training.QUIET, *SHORT]
    fit([*data, "--model.backbone", "resnet20_cifar", *place])
    (tmp_path / "own.npz").unlink()
    with pytest.raises(UserError, match=r"the run's own images, .*own\.npz.*their place is that of .*own/config\.yaml"):
        ood.main([str(tmp_path / "own"), *arrays(noise)])


def test_bad_input_ends_in_one_line_that_says_the_mend(run, noise, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "checkpoints" / "last.ckpt", "alone.ckpt")
    size = sum(Digits(imbalance_ratio=20, max_count=40).class_counts)
    (tmp_path / "file").touch()
    given = arrays(noise)
    for arguments, status, message in (
        ([], 2, "required: .*run"),
        ([str(run)], 2, "required: --data"),
        (["nowhere", *given], 1, "nowhere does not exist: give a run folder"),
        (["alone.ckpt", *given], 1, "alone.ckpt is not in a run folder, whose config.yaml says which images are known"),
        ([".", *given], 1, "is not in a run folder"),
        ([str(run), "--data=Digits"], 1, "Digits holds test images of the run itself, which are known"),
        ([str(run), "--data=ArrayImages", "--data.path=none.npz"], 1, "none.npz"),
        (
            [str(run), *given, f"--k={size + 1}"],
            1,
            f"--k {size + 1} is more than the {size} training images of the run",
        ),
        ([str(run), *given, "--k=0"], 2, "k"),
        (
            [str(run), *given, "--components=64"],
            1,
            "--components 64 leave none of 64 dimensions out: give less than 64",
        ),
        ([str(run), *given, "--accelerator=tpu9"], 1, "tpu9"),
        ([str(run), *given, "--output=file"], 1, "file cannot be written to"),
        ([str(run), *given, "--imports", "no_such"], 1, "--imports no_such"),
    ):
        monkeypatch.setattr("sys.argv", ["etflight", "ood", *arguments])
        try:
            got = __main__.run()
        except SystemExit as stop:
            got = stop.code
        error = capsys.readouterr().err.strip()
        assert (got, error.count("\n")) == (status, 0), (arguments, error)
        assert re.search(f"etflight: error: .*{message}", error), (message, error)
