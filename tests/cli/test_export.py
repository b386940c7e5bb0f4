"""`etflight export`: what a stranger reads decides as the checkpoint."""

import base64
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import onnxruntime
import pytest
import timm
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from safetensors.torch import load_file

from etflight import Classifier, ETFHead
from etflight.callbacks import LastCheckpoint
from etflight.cli import export
from etflight.data import Digits
from etflight.utils.errors import UserError

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
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[LastCheckpoint(), EMAWeightAveraging(decay=0.5)],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(0)
    model = Classifier(10, "test_resnet", in_chans=1, head=partial(ETFHead, learn_rotation=True))
    trainer.fit(model, datamodule=Digits(max_count=40, val_fraction=0.1))
    record = {"arm": "averaged", "data": {"class": "Digits", "class_counts": [40] * 10, "imbalance_ratio": 1.0}}
    (folder / "run.json").write_text(json.dumps(record))
    (folder / "test_metrics.json").write_text(json.dumps({"test/acc": 0.625}))
    (folder / "metrics.csv").write_text("step,epoch,train/loss,nc/train/nc1\n1,0,0.5,3\n2,1,0.4,2.125\n")
    (folder / "per_class.csv").write_text("class,name,train_images,acc\n0,zero|0,40,0.75\n1,<b>,40,0.5\n")
    (folder / "config.yaml").write_text("seed_everything: 0\nmodel: {backbone: test_resnet}\n")
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


def test_onnx_gives_the_calibrated_probabilities_of_any_number_of_images(exported, pictures, probabilities):
    session = onnxruntime.InferenceSession(exported / "model.onnx")
    found = [
        torch.from_numpy(session.run(None, {"images": part.numpy()})[0]).softmax(1)
        for part in normalised(pictures).split([1, 99, 400])
    ]
    torch.testing.assert_close(torch.cat(found), probabilities, rtol=0, atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    assert json.loads(told["mean"]) == list(Digits.standard_mean)
    assert json.loads(told["class_names"]) == [str(k) for k in range(10)]


def test_torch_export_gives_the_calibrated_probabilities_of_any_number_of_images(exported, pictures, probabilities):
    extra = {"input_size": ""}
    model = torch.export.load(exported / "model.pt2", extra_files=extra).module()
    found = torch.cat([model(part).softmax(1) for part in normalised(pictures).split([1, 99, 400])])
    torch.testing.assert_close(found, probabilities, rtol=0, atol=1e-5)
    assert torch.equal(model(normalised(pictures)).softmax(1), probabilities)  # also in the layout of its weights
    assert json.loads(extra["input_size"]) == [1, 8, 8]


def test_averaged_weights_are_the_ones_exported(run, exported):
    saved = torch.load(checkpoint(run), weights_only=True)
    averaged, current = (
        {name.removeprefix("backbone."): value for name, value in saved[key].items() if name.startswith("backbone.")}
        for key in ("state_dict", "current_model_state")
    )
    found = load_file(exported / "model.safetensors")
    assert found.keys() - averaged.keys() == {"fc.weight", "fc.bias"}
    assert all(torch.equal(found[name], averaged[name]) for name in averaged)
    assert not torch.equal(averaged["bn1.weight"], current["bn1.weight"])


def test_the_card_tells_recipe_results_and_collapse(run, exported):
    card = (exported / "README.md").read_text()
    for line in (
        "# averaged",
        "| data set | Digits |",
        "| test/acc | 0.625 |",
        "| nc/train/nc1 | 2.125 |",
        "  backbone: test_resnet",
        "| zero\\|0 | 40 | 0.750 |",
        "| &lt;b> | 40 | 0.500 |",
    ):
        assert line in card.splitlines(), line
    assert "**not** its probabilities" in card
    assert "import etflight" not in card  # timm itself knows the network


def test_a_network_of_ours_is_registered_by_the_import_that_the_card_names(tmp_path):
    model = Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 2}).eval()
    trainer = Trainer(accelerator="cpu", fast_dev_run=True, logger=False, enable_progress_bar=False)
    trainer.fit(model, datamodule=Digits(max_count=20))
    trainer.save_checkpoint(tmp_path / "m.ckpt")
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


def test_a_checkpoint_of_another_program_is_one_line(tmp_path):
    torch.save({"model": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not one of etflight's"):
        export.main([str(tmp_path / "other.pt"), "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


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
    with pytest.raises(UserError, match="its std is"):
        export.main([*argv[:2], str(tmp_path / "other")])


def test_data_of_other_channels_is_refused(run, tmp_path):
    pixels, labels = np.zeros((20, 8, 8, 3), np.uint8), np.arange(20) % 10
    np.savez(tmp_path / "rgb.npz", train_images=pixels, train_labels=labels, test_images=pixels, test_labels=labels)
    argv = [checkpoint(run), "--output", str(tmp_path / "out"), "--data", "ArrayImages"]
    with pytest.raises(UserError, match=r"takes images of 1 channel, but ArrayImages .*rgb\.npz has 3"):
        export.main([*argv, "--data.path", str(tmp_path / "rgb.npz")])


def test_onnx_without_its_packages_names_the_extra_and_leaves_nothing(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"onnxscript.*etflight\[export\]"):
        export.main([checkpoint(run), "--output", str(tmp_path / "out"), "--format", "onnx"])
    assert list(tmp_path.iterdir()) == []


# The Hugging Face Hub -----------------------------------------------------------------------------------------------


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's protocol as an upload of small files needs."""

    received: dict[str, bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer hf_mine":
            return self._answer({"error": "Invalid username or password."}, 401)
        if self.path == "/api/repos/create":
            answer: dict = {"url": f"http://{self.headers['Host']}/me/{json.loads(body)['name']}"}
        elif "/preupload/" in self.path:
            answer = {
                "files": [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
            }
        elif self.path == "/api/validate-yaml":
            answer = {"warnings": [], "errors": []}
        else:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.received[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            answer = {
                "commitUrl": f"http://{self.headers['Host']}/me/digits/commit/0",
                "commitOid": "0" * 40,
                "success": True,
            }
        return self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/digits", "sha": "0" * 40, "siblings": []})

    def _answer(self, content: dict, status: int = 200) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Hub.received = {}
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    yield
    server.shutdown()
    server.server_close()


def test_push_sends_every_file_to_the_hub(hub, run, tmp_path, capsys):
    export.main([checkpoint(run), "--output", str(tmp_path / "out"), "--push_to_hub", "me/digits"])
    assert Hub.received == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert "pushed to" in capsys.readouterr().out


def test_a_wrong_token_is_one_line_and_the_folder_stays(hub, run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(
        UserError, match=r"is written, but .* refuses me/digits .*401.*log in with hf auth login"
    ) as raised:
        export.main([checkpoint(run), "--output", str(tmp_path / "out"), "--push_to_hub", "me/digits"])
    assert "\n" not in str(raised.value)
    assert Hub.received == {}
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["", "https://huggingface.co/me/digits"])
def test_a_name_that_the_hub_cannot_have_is_told_before_any_work(name, tmp_path):
    argv = ["gone.ckpt", "--output", str(tmp_path / "out"), "--push_to_hub", name]
    with pytest.raises(UserError, match=f"--push_to_hub '{name}': .*Give USER/NAME") as raised:
        export.main(argv)
    assert "\n" not in str(raised.value)


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_folder_stays(run, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="is written, but the Hugging Face Hub cannot be reached") as raised:
        export.main([checkpoint(run), "--output", str(tmp_path / "out"), "--push_to_hub", "me/digits"])
    assert "\n" not in str(raised.value)
    assert (tmp_path / "out" / "model.safetensors").is_file()
