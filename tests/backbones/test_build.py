from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
from torch.testing import assert_close

from etflight.backbones import arguments_for_size, build_backbone
from etflight.utils.errors import UserError


def message_of(name: str, **kwargs: Any) -> str:
    """The message of the `UserError`, which must be one line."""
    with pytest.raises(UserError) as caught:
        build_backbone(name, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_our_models_are_in_timms_list():
    ours = {f"resnet{depth}_cifar" for depth in (20, 32, 44, 56, 110)} | {"densenet_bc_150_cifar", "resnet50_wide4"}
    assert ours <= set(timm.list_models())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet20_cifar", 32),
        ("test_resnet", 64),
        ("test_vit", 160),
        ("test_convnext", 64),
        ("mobilenetv3_small_050", 64),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_the_claimed_width_is_that_of_the_pooled_features(name, size, in_chans):
    backbone, width = build_backbone(name, in_chans=in_chans)
    with torch.no_grad():
        assert backbone.eval()(torch.randn(2, in_chans, size, size)).shape == (2, width)


def test_model_kwargs_reach_the_model():
    backbone, width = build_backbone("resnet20_cifar", model_kwargs={"width": 2, "global_pool": "catavgmax"})
    assert width == 256
    assert backbone(torch.randn(2, 3, 8, 8)).shape == (2, 256)


def test_a_tag_of_weights_may_be_in_the_name():
    assert build_backbone("test_resnet.r160_in1k")[1] == build_backbone("test_resnet")[1]


def test_an_unknown_name_offers_near_matches():
    message = message_of("resnet23")
    assert message.startswith("no timm model is called 'resnet23'; near matches: ")
    assert "resnet26" in message
    assert message.endswith("`timm.list_models()` has them all")
    assert "resnet32_cifar" in message_of("resnet32_cifr")


def test_an_unknown_name_without_near_matches_says_where_to_look():
    assert message_of("zzzzqqq") == "no timm model is called 'zzzzqqq'; `timm.list_models()` has them all"


def test_an_unknown_tag_offers_the_known_ones():
    message = message_of("resnet18.a9_in1k")
    assert "no weights called 'resnet18.a9_in1k'" in message
    assert "resnet18.a1_in1k" in message


@pytest.mark.parametrize("name", ["timm/resnet18", "local-dir:/nowhere", "attic:resnet18"])
def test_a_source_that_cannot_be_read_is_one_line(name):
    assert message_of(name).startswith(f"backbone {name!r} cannot be built: ")


@pytest.mark.parametrize("name", ["resnet20_cifar", "test_vit", "mobilenetv3_small_050"])
def test_an_argument_the_model_does_not_take_is_named(name):
    message = message_of(name, model_kwargs={"colour": "red"})
    assert message == f"timm model {name!r} does not take 'colour'; take it out of model_kwargs"


def test_an_argument_that_the_name_decides_is_refused():
    assert "does not take 'blocks'" in message_of("resnet20_cifar", model_kwargs={"blocks": 1})


@pytest.mark.parametrize("key", ["model_name", "pretrained", "in_chans", "num_classes", "features_only"])
def test_model_kwargs_cannot_undo_the_arguments_of_build_backbone(key):
    assert f"cannot set {key!r}" in message_of("resnet20_cifar", model_kwargs={key: 1})


def test_pooling_cannot_be_switched_off():
    assert "pooled features" in message_of("resnet20_cifar", model_kwargs={"global_pool": ""})


def test_the_models_own_refusal_comes_through():
    assert "positive integer" in message_of("resnet20_cifar", pretrained=True, model_kwargs={"width": 0})


def test_weights_that_do_not_exist_are_one_line_with_the_mend():
    message = message_of("resnet20_cifar", pretrained=True)
    assert message.startswith("no pretrained weights for 'resnet20_cifar'")
    assert "`pretrained: false`" in message
    assert "fine_tuning: {weights: PATH}" in message


def test_weights_out_of_reach_are_one_line_with_the_mend(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = message_of("test_resnet", pretrained=True, model_kwargs={"cache_dir": tmp_path})
    assert message.startswith("no pretrained weights for 'test_resnet'")
    assert "`pretrained: false`" in message


def local(file: Path) -> dict[str, Any]:
    return {"pretrained_cfg_overlay": {"file": str(file)}}


def test_pretrained_weights_come_from_a_local_file_whatever_its_classes(tmp_path):
    source = timm.create_model("resnet20_cifar", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    backbone, _ = build_backbone("resnet20_cifar", pretrained=True, model_kwargs=local(tmp_path / "weights.pth"))
    x = torch.randn(2, 3, 8, 8)
    expected = source.eval().forward_head(source.forward_features(x), pre_logits=True)
    assert_close(backbone.eval()(x), expected, rtol=0, atol=0)


def test_pretrained_colour_stem_is_summed_for_grey_images(tmp_path):
    source = timm.create_model("resnet20_cifar", num_classes=10)
    torch.save(source.state_dict(), tmp_path / "weights.pth")
    kwargs = local(tmp_path / "weights.pth")
    backbone, _ = build_backbone("resnet20_cifar", in_chans=1, pretrained=True, model_kwargs=kwargs)
    assert_close(backbone.get_parameter("conv1.weight"), source.conv1.weight.sum(1, keepdim=True))


def test_a_local_file_that_is_missing_is_named(tmp_path):
    file = tmp_path / "absent.pth"
    assert str(file) in message_of("resnet20_cifar", pretrained=True, model_kwargs=local(file))
    assert str(file) in message_of("resnet20_cifar", model_kwargs={"checkpoint_path": str(file)})


@pytest.mark.parametrize("content", [b"", b"these are no weights", b"<html></html>"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_local_file_that_holds_no_weights_is_one_line(tmp_path, suffix, content):
    file = tmp_path / f"noise{suffix}"
    file.write_bytes(content)
    message = message_of("resnet20_cifar", pretrained=True, model_kwargs=local(file))
    assert message.startswith("no pretrained weights for 'resnet20_cifar'")
    assert "cannot be built" in message_of("resnet20_cifar", model_kwargs={"checkpoint_path": str(file)})


def test_weights_of_another_shape_are_one_line(tmp_path):
    torch.save(timm.create_model("resnet20_cifar", width=2).state_dict(), tmp_path / "wide.pth")
    message = message_of("resnet20_cifar", pretrained=True, model_kwargs=local(tmp_path / "wide.pth"))
    assert "size mismatch" in message
    assert len(message) < 500


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 32, 48)])
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
