"""`etflight export`: what a stranger reads decides as the checkpoint."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import create_autospec

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from etflight import Classifier, ETFHead
from etflight.callbacks import LastCheckpoint
from etflight.cli import export
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.training import new_trainer, save_trained

WITHOUT_ETFLIGHT = """
import json, sys
import numpy as np, timm, torch
from PIL import Image
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
images = torch.stack([transform(Image.fromarray(pixels)) for pixels in np.load(sys.argv[2])])
with torch.no_grad():
    labels = model(images).argmax(1).tolist()
print(json.dumps([labels, model.pretrained_cfg["label_names"], "etflight" in sys.modules]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a timm model with averaged weights, after a short training on the digits."""
    folder = tmp_path_factory.mktemp("runs") / "averaged"
    trainer = new_trainer(LastCheckpoint(), EMAWeightAveraging(decay=0.5), max_epochs=2, default_root_dir=folder)
    torch.manual_seed(0)
    model = Classifier(10, "test_resnet", in_chans=1, head=partial(ETFHead, learn_rotation=True))
    trainer.fit(model, datamodule=Digits(max_count=40, val_fraction=0.1))
    record = {"arm": "averaged", "data": {"class": "Digits", "class_counts": [40] * 10, "imbalance_ratio": 1.0}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "test_metrics.json").write_text(json.dumps({"test/acc": 0.625}))
    (folder / "metrics.csv").write_text("step,epoch,train/loss,nc/train/nc1\n1,0,0.5,3\n2,1,0.4,2.125\n")
    (folder / "per_class.csv").write_text("class,name,train_images,acc\n0,zero|0,40,0.75\n1,<b>,40,0.5\n")
    (folder / "config.yaml").write_text(
        "seed_everything: 0\nmodel: {backbone: test_resnet}\ntrainer: {callbacks: [{class_path: EMAWeightAveraging}]}\n"
    )
    return folder


def checkpoint(run: Path) -> str:
    return str(run / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "all three"
    export.main([checkpoint(run), "--output", str(folder), "--format", "timm", "onnx", "torch-export"])
    return folder


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """The digits' test images, uint8 `[500, 8, 8]`."""
    return torch.cat([images for images, _ in Digits().eval_dataloader("test")])[:, 0].numpy()


@pytest.fixture(scope="module")
def probabilities(run: Path, pictures: np.ndarray) -> torch.Tensor:
    model = Classifier.load_from_checkpoint(checkpoint(run)).eval()
    assert model.temperature != 1
    current = torch.load(checkpoint(run), weights_only=True)["current_model_state"]
    assert not torch.equal(model.backbone.bn1.weight, current["backbone.bn1.weight"])  # of which these are the averages
    with torch.no_grad():
        return model.probabilities(normalised(pictures))


def normalised(pictures: np.ndarray) -> torch.Tensor:
    return (torch.from_numpy(pictures)[:, None] / 255 - Digits.standard_mean[0]) / Digits.standard_std[0]


def test_timm_alone_decides_as_the_checkpoint(exported, pictures, probabilities, tmp_path):
    np.save(tmp_path / "pictures.npy", pictures)
    argv = [sys.executable, "-c", WITHOUT_ETFLIGHT, str(exported), str(tmp_path / "pictures.npy")]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    labels, names, knows_etflight = json.loads(done.stdout)
    assert not knows_etflight
    assert labels == probabilities.argmax(1).tolist()
    assert names == [str(k) for k in range(10)]


def test_onnx_and_torch_export_give_the_calibrated_probabilities_of_any_number_of_images(
    exported, pictures, probabilities
):
    parts = normalised(pictures).split([1, 99, 400])
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    found = [torch.from_numpy(session.run(None, {"images": part.numpy()})[0]).softmax(1) for part in parts]
    torch.testing.assert_close(torch.cat(found), probabilities, rtol=0, atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["mean"]) == list(Digits.standard_mean)
    assert json.loads(told["class_names"]) == [str(k) for k in range(10)]
    extra = {"input_size": ""}
    model = torch.export.load(exported / "model.pt2", extra_files=extra).module()
    torch.testing.assert_close(torch.cat([model(part).softmax(1) for part in parts]), probabilities, rtol=0, atol=1e-5)
    assert torch.equal(model(normalised(pictures)).softmax(1), probabilities)  # also in the layout of its weights
    assert json.loads(extra["input_size"]) == [1, 8, 8]


def test_the_card_tells_recipe_results_and_collapse(run, exported):
    card = (exported / "README.md").read_text()
    for line in (
        "# all three",
        "| data set | Digits |",
        "| test/acc | 0.625 |",
        "| nc/train/nc1 | 2.125 |",
        "  backbone: test_resnet",
        "  - class_path: EMAWeightAveraging",
        "| zero\\|0 | 40 | 0.750 |",
        "| &lt;b> | 40 | 0.500 |",
    ):
        assert line in card.splitlines(), line
    assert "**not** its probabilities" in card
    assert "import etflight" not in card  # timm itself knows the network


def test_the_card_of_an_earlier_checkpoint_tells_the_recipe_but_no_results(run, tmp_path, capsys):
    earlier = shutil.copy(checkpoint(run), run / "checkpoints" / "epoch=0-step=4.ckpt")
    export.main([str(earlier), "--output", str(tmp_path / "earlier")])
    card = (tmp_path / "earlier" / "README.md").read_text()
    assert "  backbone: test_resnet" in card
    assert "| data set | Digits |" in card
    assert "The weights are those of an earlier epoch" in card
    assert not [
        line for line in card.splitlines() if line.startswith(("## Results", "## Neural", "## Classes", "| epochs"))
    ]


def test_a_network_of_ours_is_registered_by_the_import_that_the_card_names(tmp_path):
    model = Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 2}).eval()
    save_trained(tmp_path / "m.ckpt", model, Digits(max_count=20), limit_train_batches=1)
    export.main([str(tmp_path / "m.ckpt"), "--output", str(tmp_path / "new" / "m")])
    assert "import etflight.backbones.resnet_cifar" in (tmp_path / "new" / "m" / "README.md").read_text()
    images = torch.rand(3, 1, 8, 8)
    read = timm.create_model(f"local-dir:{tmp_path / 'new' / 'm'}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(read(images).argmax(1), model.eval()(images).argmax(1))


def test_half_written_files_of_the_run_are_named_and_left_out(run, tmp_path, capsys):
    folder = tmp_path / "half"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(Path(checkpoint(run)).read_bytes())
    (folder / "run.json").write_text('{"arm": ')
    export.main([checkpoint(folder), "--output", str(tmp_path / "out")])
    assert f"{folder / 'run.json'} is not whole" in capsys.readouterr().out
    assert "## Results" not in (tmp_path / "out" / "README.md").read_text()


# Bad input ----------------------------------------------------------------------------------------------------------


def test_a_folder_with_files_is_never_touched(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already and stays as it is"):
        export.main([checkpoint(run), "--output", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_normalisation_is_asked_for_and_taken_from_the_data(run, tmp_path):
    saved = torch.load(checkpoint(run), weights_only=True)
    del saved["preprocessing"]
    torch.save(saved, tmp_path / "old.ckpt")
    argv = [str(tmp_path / "old.ckpt"), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="give its data"):
        export.main(argv)
    export.main([*argv, "--data", "Digits"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["pretrained_cfg"]["mean"] == list(Digits.standard_mean)
    saved["preprocessing"] = {"input_size": (1, 8, 8), "mean": [0.5], "std": [0.0], "crop_pct": 1.0}
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="preprocessing, std is"):
        export.main([*argv[:2], str(tmp_path / "other")])


def test_onnx_without_its_packages_names_the_extra_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript.*etflight\[export\]"):
        export.main([checkpoint(run), "--output", str(tmp_path / "out"), "--format", "onnx"])
    assert list(tmp_path.iterdir()) == []


# The Hugging Face Hub -----------------------------------------------------------------------------------------------


def test_push_sends_the_folder_to_the_hub_or_tells_in_one_line_why_not(run, tmp_path, monkeypatch, capsys):
    client = create_autospec(huggingface_hub.HfApi)
    monkeypatch.setattr(huggingface_hub, "HfApi", client)
    hub = client.return_value
    hub.create_repo.side_effect = lambda name, **_: huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")
    argv = [checkpoint(run), "--push_to_hub", "me/digits", "--output"]
    export.main([*argv, str(tmp_path / "out")])
    (sent,) = hub.upload_folder.call_args_list
    assert (sent.kwargs["folder_path"], sent.kwargs["repo_id"]) == (tmp_path / "out", "me/digits")
    assert "pushed to https://huggingface.co/me/digits" in capsys.readouterr().out
    hub.upload_folder.side_effect = OSError("401 Client Error\n\nInvalid username or password.")
    with pytest.raises(UserError, match=r"is written, but .* refuses me/digits .*401.*hf auth login") as raised:
        export.main([*argv, str(tmp_path / "again")])
    assert "\n" not in str(raised.value)
    assert (tmp_path / "again" / "model.safetensors").is_file()
