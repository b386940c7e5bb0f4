import pytest
import timm
import torch
from torch.testing import assert_close

from tests.backbones.nets import images, make, num_parameters


def described(name, **kwargs):
    """A network with shapes but without numbers, which take seconds to draw."""
    with torch.device("meta"):
        return timm.create_model(name, **kwargs)


@pytest.fixture(scope="module")
def wide():
    return make("resnet50_wide4", num_classes=0)


def stage_parameters(in_chs: int, planes: int, blocks: int) -> int:
    """Bottlenecks of 1 × 1, 3 × 3 and 1 × 1 convolutions with BatchNorm, the first with a projection shortcut."""
    out, total = 4 * planes, 0
    for block in range(blocks):
        total += in_chs * planes + 9 * planes * planes + planes * out + 2 * (planes + planes + out)
        total += (in_chs * out + 2 * out) if block == 0 else 0
        in_chs = out
    return total


def test_the_last_stage_alone_is_wider():
    model = described("resnet50_wide4", num_classes=0)
    stages = [(64, 64, 3), (256, 128, 4), (512, 256, 6), (1024, 1024, 3)]
    expected = [49 * 3 * 64 + 2 * 64, *(stage_parameters(*stage) for stage in stages)]
    assert num_parameters(model) == sum(expected)
    assert [num_parameters(model.get_submodule(f"layer{i}")) for i in (1, 2, 3, 4)] == expected[1:]


def test_features_are_4096_wide_and_trainable(wide):
    model = wide.to(memory_format=torch.channels_last)
    assert model.num_features == model.head_hidden_size == 4096
    x = images(64).to(memory_format=torch.channels_last)
    features = model.forward_features(x)
    assert features.shape == (2, 4096, 2, 2)
    assert features.is_contiguous(memory_format=torch.channels_last)
    pooled = model.forward_head(features)
    assert_close(pooled, features.mean((2, 3)))
    pooled.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_timms_resnet50_fits_everything_before_the_last_stage(wide):
    plain = make("resnet50", num_classes=0, seed=1)
    own, given = wide.state_dict(), plain.state_dict()
    assert own.keys() == given.keys()
    fitting = {name: value for name, value in given.items() if value.shape == own[name].shape}
    assert {name.split(".")[0] for name in given.keys() - fitting.keys()} == {"layer4"}
    wide.load_state_dict(fitting, strict=False)
    x = images(64)
    with torch.no_grad():
        before_last = [m.forward_intermediates(x, [3], stop_early=True, intermediates_only=True) for m in (wide, plain)]
    assert_close(*before_last, rtol=1e-4, atol=1e-5)  # one of them is in channels_last


def test_timms_contract_comes_with_timms_class():
    model = described("resnet50_wide4", features_only=True, in_chans=1)
    features = model(torch.empty(2, 1, 64, 64, device="meta"))
    assert model.feature_info.channels() == [f.shape[1] for f in features] == [64, 256, 512, 1024, 4096]
    with_classifier = described("resnet50_wide4")
    assert with_classifier.get_classifier().weight.shape == (1000, 4096)
    assert with_classifier.pretrained_cfg["input_size"] == (3, 224, 224)
