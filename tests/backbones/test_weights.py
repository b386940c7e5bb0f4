"""Weights from a file: the same network as timm's own, or one line that says why not."""

import pickle
import struct
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models.metaformer import MetaFormer
from torch.testing import assert_close

from etflight.backbones import build_backbone, load_weights
from etflight.utils.errors import UserError
from tests.backbones.nets import images
from tests.hostile import Bomb, save_packed


@pytest.fixture(scope="module")
def trained():
    """A network with a classifier, whose weights and statistics are those of no new one."""
    torch.manual_seed(7)
    model = timm.create_model("test_resnet", num_classes=5)
    for _ in range(3):
        model(torch.randn(8, 3, 32, 32) + 1)
    return model.eval()


def save(content, path):
    safetensors.torch.save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def refused(name, path, **kwargs):
    backbone, _ = build_backbone(name, **kwargs)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(UserError) as caught:
        load_weights(backbone, path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key])
    return message


FILES = {
    "w.safetensors": lambda state: state,
    "w.pth": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
    "w.pt": lambda state: {"state_dict": state, "epoch": 3, "arch": "test_resnet"},
    "w.bin": lambda state: {"model": {f"module.{name}": value for name, value in state.items()}},
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("in_chans", [3, 1])
def test_features_are_those_of_the_network_that_was_saved(file, in_chans, trained, tmp_path):
    """Grey images are seen as the colour images of their greys."""
    path = save(FILES[file](trained.state_dict()), tmp_path / file)
    backbone, _ = build_backbone("test_resnet", in_chans=in_chans)
    assert load_weights(backbone, path) == ["fc.bias", "fc.weight"]
    x = images(32, in_chans)
    expected = trained.forward_head(trained.forward_features(x.expand(-1, 3, -1, -1)), pre_logits=True)
    assert_close(backbone.eval()(x), expected)


def test_every_registered_end_is_left_out_by_its_own_name(tmp_path):
    for name in ("test_vit", "test_convnext", "test_efficientnet", "densenet_bc_150_cifar"):
        model = timm.create_model(name, num_classes=5)
        left_out = load_weights(build_backbone(name)[0], save(model.state_dict(), tmp_path / f"{name}.safetensors"))
        ends = {n for n, layer in model.named_modules() if layer is model.get_classifier()}
        assert {n.rpartition(".")[0] for n in left_out} == ends


LEVIT = partial(timm.create_model, "levit_128s", embed_dim=(8, 8, 8), key_dim=4, num_heads=(2, 2, 2), depth=(1, 1, 1))


def caformer(num_classes):
    """Small, which timm's own maker cannot be asked for."""
    model = MetaFormer(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), use_mlp_head=True, num_classes=num_classes)
    model.pretrained_cfg = timm.get_pretrained_cfg("caformer_s18").to_dict()
    return model


@pytest.mark.parametrize(("make", "end"), [(LEVIT, "head"), (caformer, "head.fc.")], ids=["LeViT", "CAFormer"])
def test_a_classifier_of_several_layers_is_left_out_whole(make, end, tmp_path):
    state, backbone = make(num_classes=5).state_dict(), make(num_classes=0)
    left_out = load_weights(backbone, save(state, tmp_path / "w.safetensors"))
    assert left_out == sorted(name for name in state if name.startswith(end))
    assert len(left_out) > 2
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("name", "given", "reason"),
    [
        ("resnet20_cifar", {"model_name": "resnet32_cifar"}, "it has a layer1.3.bn1.bias (and 71 more), with no place"),
        ("resnet32_cifar", {}, "it has no layer1.3.conv1.weight (and 59 more)"),
        ("resnet20_cifar", {"width": 2}, "its conv1.weight is [32, 3, 3, 3], not [16, 3, 3, 3] (and "),
        ("resnet20_cifar", {"in_chans": 4}, "its conv1.weight is [16, 4, 3, 3], not [16, 3, 3, 3]"),
    ],
)
def test_weights_of_another_network_are_told_in_one_line(name, given, reason, tmp_path):
    state = timm.create_model(**{"model_name": "resnet20_cifar", **given}).state_dict()
    message = refused(name, save(state, tmp_path / "w.safetensors"))
    assert reason in message
    assert "give the backbone they were made for" in message


def test_an_unknown_first_convolution_and_a_missing_file_are_told_in_one_line(trained, tmp_path):
    state = trained.state_dict() | {"conv1.0.weight": torch.ones(3), "conv1.weight": torch.ones(3)}
    assert "conv1" in refused("test_resnet", save(state, tmp_path / "w.pth"), in_chans=1)
    assert f"{tmp_path} is a folder: give the path of" in refused("test_resnet", tmp_path)
    assert "gone.pth does not exist" in refused("test_resnet", tmp_path / "gone.pth")
    assert "not a file on this machine" in refused("test_resnet", "https://example.org/w.safetensors")


OUTSIDE = b'{"fc.weight": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000000000]}}'
HOSTILE = {
    "code.pth": lambda: torch.save({"bomb": Bomb()}, "code.pth"),
    "bare.pth": lambda: Path("bare.pth").write_bytes(pickle.dumps(Bomb())),
    "list.pth": lambda: torch.save([1, 2], "list.pth"),
    "number.pth": lambda: torch.save({"state_dict": 3}, "number.pth"),
    "text.pth": lambda: Path("text.pth").write_text("hello"),
    "objects.npz": lambda: np.savez("objects.npz", state_dict=np.array([Bomb()], dtype=object)),
    "text.safetensors": lambda: Path("text.safetensors").write_text("hello, hello"),
    "long.safetensors": lambda: Path("long.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "outside.safetensors": lambda: Path("outside.safetensors").write_bytes(struct.pack("<Q", len(OUTSIDE)) + OUTSIDE + b"x"),
    "sparse.pth": lambda: torch.save({"conv1.weight": torch.eye(3).to_sparse()}, "sparse.pth"),
    "packed.pth": lambda: save_packed({"conv1.weight": torch.zeros(10**6)}, "packed.pth"),
    "endless.pth": lambda: torch.save({"conv1.weight": torch.zeros(1).expand(10**12)}, "endless.pth"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_weights_are_refused_and_nothing_in_them_is_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    HOSTILE[name]()
    message = refused("test_resnet", name)
    assert f"weights {name} " in message
    assert name != "packed.pth" or "was refused and nothing in it was run" in message  # not that it does not fit
    assert not (tmp_path / "ran").exists()
