"""`etflight retrieval`: one model's embeddings among those of another."""

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from etflight import Classifier, CrossEntropyLoss, ETFHead, simplex_etf
from etflight.analysis.outputs import Outputs
from etflight.analysis.retrieval import Embedded, compare
from etflight.backbones.cifar import CifarNet
from etflight.cli import retrieval
from etflight.data import Digits
from etflight.metrics.retrieval import retrieval_scores
from etflight.utils.errors import UserError
from tests.training import fit_digits, save_arrays, save_trained, seen, written

ARM = ["--model.loss=CrossEntropyLoss", "--monitor=null", "--data.max_count=20", "--trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of the same frame with other seeds, and one of learnable class vectors."""
    folders = [tmp_path_factory.mktemp(name) for name in ("a", "b", "c")]
    heads = [["--model.head=ETFHead"], ["--model.head=ETFHead", "--seed_everything=1"], ["--model.head=CosineHead"]]
    return [fit_digits(folder, *ARM, *head) for folder, head in zip(folders, heads, strict=True)]


def test_each_model_searches_among_the_embeddings_of_each(runs, capsys):
    retrieval.main([*map(str, runs), "--output", str(runs[0] / "found.json")])
    record = json.loads((runs[0] / "found.json").read_text())
    assert "across" in capsys.readouterr().out
    models = [Classifier.load_from_checkpoint(run / "checkpoints/last.ckpt").eval() for run in runs]
    embeddings = []
    for model in models:
        embedding, labels = seen(Digits(), "test", lambda x, model=model: model.head.embed(model.features(x)))
        embeddings.append(embedding)
    pairs = {(p["query"], p["gallery"]): p for p in record["pairs"] if p["space"] == "embedding"}
    for i, j in ((0, 0), (0, 1), (2, 1)):
        scores = retrieval_scores(embeddings[i], labels, embeddings[j], labels, same_images=True)
        assert pairs[i, j]["mean_average_precision"] == pytest.approx(scores.mean_average_precision, abs=1e-4)
    # the first and the second have the same class vectors, so there is nothing to rotate
    turned = {(p["query"], p["gallery"]): p for p in record["pairs"] if p["space"] == "rotated"}
    assert turned[0, 1]["mean_average_precision"] == pytest.approx(pairs[0, 1]["mean_average_precision"], abs=0.02)
    assert record["class_vectors_differ"] > 0


def test_stored_features_give_the_same_scores_and_are_not_computed_again(runs, tmp_path, monkeypatch):
    words, features = [*map(str, runs[:2])], ["--features", str(tmp_path / "features")]
    retrieval.main([*words, "--output", str(tmp_path / "plain.json")])
    retrieval.main([*words, *features, "--output", str(tmp_path / "first.json")])
    stores = written(tmp_path / "features")
    assert len(stores) == 2  # one for each backbone
    monkeypatch.setattr(CifarNet, "forward", None)  # nothing may call it
    retrieval.main([*words[::-1], *features, "--output", str(tmp_path / "second.json")])
    assert written(tmp_path / "features") == stores
    plain, first, second = (
        {
            (p["space"], p["query"], p["gallery"]): p["mean_average_precision"]
            for p in json.loads(file.read_text())["pairs"]
        }
        for file in (tmp_path / "plain.json", tmp_path / "first.json", tmp_path / "second.json")
    )
    for (space, query, gallery), score in plain.items():
        assert first[space, query, gallery] == pytest.approx(score, abs=1e-4)
        if space == "embedding":  # the models have changed places
            assert second[space, 1 - query, 1 - gallery] == pytest.approx(score, abs=1e-4)


def test_the_same_frame_is_said_to_be_the_same(runs):
    retrieval.main([*map(str, runs[:2])])
    assert json.loads((runs[0] / "retrieval.json").read_text())["class_vectors_differ"] == 0


def test_a_rotation_of_one_models_space_is_undone_by_the_rotated_space():
    torch.manual_seed(0)
    weight, labels = torch.randn(10, 16).double(), torch.arange(80) % 10
    # classes that can be told apart, with as much noise in the dimensions that the class vectors do not span
    embedding = weight[labels] + 1.5 * torch.randn(80, 16).double()
    turn = torch.linalg.qr(torch.randn(16, 16).double()).Q
    models = [
        Embedded(Outputs(embedding @ R, embedding @ R, embedding @ weight.T, labels), weight @ R)
        for R in (torch.eye(16).double(), turn)
    ]
    span = embedding @ torch.linalg.pinv(weight) @ weight
    expected = retrieval_scores(span, labels, span, labels, same_images=True)
    pairs = {(p["space"], p["query"], p["gallery"]): p["mean_average_precision"] for p in compare(models)["pairs"]}
    assert pairs["embedding", 0, 1] < 0.5 * pairs["embedding", 0, 0]
    for query, gallery in product((0, 1), repeat=2):
        assert pairs["rotated", query, gallery] == pytest.approx(expected.mean_average_precision, abs=1e-9)
        assert pairs["logits", query, gallery] == pytest.approx(pairs["logits", 0, 0], abs=1e-9)


def test_the_rotated_space_does_not_depend_on_rounding_of_the_class_vectors():
    torch.manual_seed(0)
    weight, labels = simplex_etf(10, 64), torch.arange(80) % 20  # classes that the vectors do not know
    embedding = torch.randn(20, 64)[labels] + 0.3 * torch.randn(80, 64)
    turn = torch.linalg.qr(torch.randn(64, 64)).Q
    found = []
    for noise in (0, 1e-7, 1e-6):
        vectors = weight @ turn + noise * torch.randn(10, 64)
        models = [
            Embedded(Outputs(h, h, h @ w.T, labels), w) for h, w in ((embedding, weight), (embedding @ turn, vectors))
        ]
        (pair,) = [p for p in compare(models)["pairs"] if (p["space"], p["query"], p["gallery"]) == ("rotated", 1, 0)]
        found.append(pair["mean_average_precision"])
    assert found == pytest.approx([found[0]] * 3, abs=1e-4)


def test_the_difference_of_class_vectors_is_the_largest_of_any_two_models():
    weight, h = torch.zeros(4, 4), torch.eye(4)
    models = [Embedded(Outputs(h, h, h, torch.arange(4) % 2), weight + shift) for shift in (0, 1, -1)]
    assert compare(models)["class_vectors_differ"] == 2


def test_only_test_images_are_read_and_fetched_if_they_are_missing(runs, tmp_path, monkeypatch):
    happened = []
    load = Digits.load
    monkeypatch.setattr(Digits, "load", lambda self, split: happened.append(split) or load(self, split))
    monkeypatch.setattr(Digits, "prepare_data", lambda self: happened.append("fetched"))
    one_class = ["--data=ClassSubset", "--data.images=Digits", "--data.classes=4"]
    retrieval.main([str(runs[0]), *one_class, f"--output={tmp_path / 'r.json'}"])
    assert happened == ["fetched", "test"]


def test_images_of_other_classes_can_be_searched(runs, tmp_path):
    save_arrays(tmp_path / "other.npz", classes=4)
    retrieval.main(
        [
            str(runs[0]),
            str(runs[1]),
            "--data=ArrayImages",
            f"--data.path={tmp_path / 'other.npz'}",
            f"--output={tmp_path / 'r.json'}",
        ]
    )
    assert json.loads((tmp_path / "r.json").read_text())["data"]["dataset"] == "other"


def test_each_model_has_its_images_normalised_as_in_its_own_training(runs, tmp_path):
    other = fit_digits(tmp_path, *ARM, "--model.head=ETFHead", "--data.mean=[0.1]", "--data.std=[0.9]")
    retrieval.main([str(runs[0]), str(other), f"--output={tmp_path / 'both.json'}"])
    retrieval.main([str(other), f"--output={tmp_path / 'alone.json'}"])
    both, alone = (json.loads((tmp_path / name).read_text())["pairs"] for name in ("both.json", "alone.json"))
    (found,) = [pair for pair in both if (pair["space"], pair["query"], pair["gallery"]) == ("embedding", 1, 1)]
    (expected,) = [pair for pair in alone if pair["space"] == "embedding"]
    assert found["mean_average_precision"] == expected["mean_average_precision"]


def test_results_of_other_models_are_not_replaced(runs, tmp_path):
    output = f"--output={tmp_path / 'r.json'}"
    for _ in range(2):
        retrieval.main([str(runs[0]), str(runs[1]), output])
    before = (tmp_path / "r.json").read_bytes()
    with pytest.raises(UserError, match=r"r\.json holds other results .models: .*give --output"):
        retrieval.main([str(runs[0]), str(runs[2]), output])
    with pytest.raises(UserError, match=r"r\.json holds other results .preprocessing: "):
        retrieval.main([str(runs[0]), str(runs[1]), output, "--data.mean=[0.9]"])
    with pytest.raises(UserError, match="is a folder: give --output the name of a file"):
        retrieval.main([str(runs[0]), f"--output={tmp_path}"])
    assert (tmp_path / "r.json").read_bytes() == before


def test_models_that_cannot_be_compared_are_one_line(runs, tmp_path):
    wide = Classifier(10, "resnet20_cifar", ETFHead, CrossEntropyLoss, in_chans=1, model_kwargs={"width": 2})
    other = save_trained(tmp_path / "wide.ckpt", wide, Digits(max_count=20))
    with pytest.raises(UserError, match=r"class vectors \[10, 128\], but .* \[10, 64\]"):
        retrieval.main([str(runs[0]), str(other)])
    renamed = {}
    for name in ("cat", "dog"):
        model = Classifier(10, "resnet20_cifar", ETFHead, CrossEntropyLoss, in_chans=1)
        model.class_names = [name, *map(str, range(1, 10))]
        checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
        model.on_save_checkpoint(checkpoint)
        torch.save(checkpoint, renamed.setdefault(name, tmp_path / f"{name}.ckpt"))
    with pytest.raises(UserError, match=r"class 0 is 'cat' in .*cat\.ckpt, but 'dog' in .*dog\.ckpt"):
        retrieval.main([*map(str, renamed.values()), "--data=Digits"])
    retrieval.main([str(runs[0]), str(renamed["cat"]), f"--output={tmp_path / 'r.json'}"])  # mere numbers are no names
    with pytest.raises(UserError, match="nowhere does not exist"):
        retrieval.main([str(runs[0]), "nowhere"])
    save_arrays(tmp_path / "colour.npz", shape=(8, 8, 3))
    with pytest.raises(UserError, match="takes images of 1 channel"):
        retrieval.main([str(runs[0]), "--data=ArrayImages", f"--data.path={tmp_path / 'colour.npz'}"])
