import re

import huggingface_hub.constants
import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.backbones import arguments_for_size, build_backbone
from etflight.utils.errors import UserError, user_error_in


def message_of(name, **kwargs):
    """The message of the `UserError`, which must be one line of bounded length."""
    with pytest.raises(UserError) as caught:
        build_backbone(name, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def test_our_models_are_in_timms_list():
    ours = {f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110)} | {"densenet_bc_150_cifar", "resnet50_wide4"}
    assert ours <= set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "size", "in_chans"),
    [
        ("resnet20_cifar", 32, 1),
        ("test_resnet.r160_in1k", 64, 1),  # with a tag of weights
        ("test_vit", 160, 3),
        ("mobilenetv3_small_050", 64, 3),  # is wider behind its pooling
    ],
)
def test_the_claimed_width_is_that_of_the_pooled_features(name, size, in_chans):
    backbone, width = build_backbone(name, in_chans=in_chans)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, in_chans, size, size)).shape == (2, width)


def test_model_kwargs_reach_the_model():
    backbone, width = build_backbone("resnet20_cifar", model_kwargs={"width": 2, "global_pool": "catavgmax"})
    assert width == 256
    assert backbone(torch.randn(2, 3, 8, 8)).shape == (2, 256)


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("resnet32_cifr", {}, r"Unknown model \(resnet32_cifr\); near matches: resnet32_cifar"),
        ("zzzzqqq", {}, r"`timm.list_models\(\)` has all"),
        ("resnet18.a9_in1k", {}, r"near matches: .*resnet18\.a1_in1k"),
        ("timm/resnet18", {}, "no source prefix"),
        ("local-dir:/nowhere", {}, "Config file not found"),
        ("resnet20_cifar", {"colour": "red"}, "unexpected keyword argument 'colour'.*model_kwargs"),
        ("resnet20_cifar", {"blocks": 1}, "multiple values for keyword argument 'blocks'"),
    ],
)
def test_what_cannot_be_built_is_one_line(name, kwargs, reason):
    with pytest.raises(UserError, match=f"backbone {name!r} cannot be built: .*{reason}"):
        build_backbone(name, model_kwargs=kwargs)
    message_of(name, model_kwargs=kwargs)


TAKEN = {"model_name": "x", "pretrained": 1, "in_chans": 1, "num_classes": 9, "features_only": True, "global_pool": ""}


@pytest.mark.parametrize("name", TAKEN)
def test_model_kwargs_cannot_undo_the_arguments_of_build_backbone(name):
    assert repr(name) in message_of("resnet20_cifar", model_kwargs={name: TAKEN[name]})


def test_the_models_own_refusal_comes_through():
    message = message_of("resnet20_cifar", pretrained=True, model_kwargs={"width": 0})
    assert message.startswith("the width multiplier of a CIFAR ResNet is a positive integer")


def test_weights_that_do_not_exist_or_are_out_of_reach_are_one_line_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name, kwargs in (("resnet20_cifar", {}), ("test_resnet", {"cache_dir": tmp_path})):
        message = message_of(name, pretrained=True, model_kwargs=kwargs)
        assert message.startswith(f"backbone {name!r} cannot be built: ")
        assert message.endswith(
            "give `pretrained: false`, and a local file of weights by `fine_tuning: {weights: PATH}`"
        )


@pytest.mark.parametrize("in_chans", [3, 1])
def test_pretrained_weights_may_come_from_a_local_file_whatever_its_classes(in_chans, tmp_path):
    source = timm.create_model("resnet20_cifar", num_classes=10).eval()
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    overlay = {"pretrained_cfg_overlay": {"file": str(tmp_path / "weights.pth")}}
    backbone, _ = build_backbone("resnet20_cifar", in_chans=in_chans, pretrained=True, model_kwargs=overlay)
    x = torch.randn(2, in_chans, 8, 8)
    expected = source.forward_head(source.forward_features(x.expand(-1, 3, -1, -1)), pre_logits=True)
    assert_close(backbone.eval()(x), expected, rtol=0, atol=0 if in_chans == 3 else 1e-5)


@pytest.mark.parametrize("content", [None, b"", b"<html></html>"], ids=["missing", "empty", "a page"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_that_holds_no_weights_is_named_in_one_line(content, suffix, tmp_path):
    file = tmp_path / f"noise{suffix}"
    if content is not None:
        file.write_bytes(content)
    overlay = {"pretrained_cfg_overlay": {"file": str(file)}}
    assert f"cannot be built: {file}" in message_of("resnet20_cifar", pretrained=True, model_kwargs=overlay)
    assert f"cannot be built: {file}" in message_of("resnet20_cifar", model_kwargs={"checkpoint_path": str(file)})


@pytest.mark.parametrize(
    ("name", "shape"),
    [("test_vit", (1, 28, 28)), ("test_vit", (3, 32, 48)), ("swin_tiny_patch4_window7_224", (3, 32, 32))],
)
def test_a_transformer_made_for_a_size_sees_all_pixels_of_its_images(name, shape):
    arguments = arguments_for_size(name, shape, None)
    backbone, width = build_backbone(name, in_chans=shape[0], model_kwargs=arguments)
    images = torch.zeros(2, *shape, requires_grad=True)
    features = backbone.eval()(images)
    assert features.shape == (2, width)
    features.square().sum().backward()
    assert (images.grad.abs().sum(dim=(0, 1)) > 0).all()


def test_a_network_that_cannot_be_made_for_a_size_is_none():
    assert arguments_for_size("test_convnext", (3, 8, 8), None) is None


class Broken(nn.Module):
    """A network that fails on images of any size."""

    num_features = 4

    def __init__(self, message):
        super().__init__()
        self.message = message

    def forward(self, images):
        raise RuntimeError(self.message)


@timm.models.register_model
def broken_network(message="a device failed", **_):
    return Broken(message)


@pytest.mark.parametrize("message", ["a device failed", "DataLoader worker (pid 7) is killed by signal: Terminated. "])
def test_an_error_that_images_of_all_sizes_meet_is_not_blamed_on_the_size(message):
    model = Classifier(3, "broken_network", LinearHead, CrossEntropyLoss, model_kwargs={"message": message})
    with pytest.raises(RuntimeError, match=re.escape(message)) as caught:
        model(torch.zeros(2, 3, 128, 128))
    assert user_error_in(caught.value) is None


def test_a_loader_process_that_dies_while_small_images_are_tried_is_not_blamed_on_the_size():
    model = Classifier(3, "test_convnext", LinearHead, CrossEntropyLoss)

    def die(*_):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")

    model.backbone.register_forward_pre_hook(die)
    with pytest.raises(RuntimeError, match="killed by signal") as caught:
        model(torch.zeros(2, 3, 8, 8))
    assert user_error_in(caught.value) is None


def test_the_sizes_that_a_network_is_said_to_take_have_been_tried():
    model = Classifier(3, "test_convnext", LinearHead, CrossEntropyLoss)
    with pytest.raises(UserError, match=r"of 3 x 8 x 8 \(.*: give larger ones, such as 32 x 32, or another backbone"):
        model(torch.zeros(2, 3, 8, 8))
    model.eval()(torch.zeros(2, 3, 32, 32))
