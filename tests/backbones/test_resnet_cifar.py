from functools import partial

import pytest
from torch import nn
from torch.testing import assert_close

from etflight.backbones.resnet_cifar import BasicBlock
from etflight.utils.errors import UserError
from tests.backbones import nets
from tests.backbones.nets import images, num_parameters

make = partial(nets.make, "resnet20_cifar")


def expected_parameters(depth: int, width: int = 1, in_chans: int = 3) -> int:
    """Every convolution and its BatchNorm, counted from the paper's table."""
    chs, total = 16 * width, 9 * in_chans * 16 * width + 2 * 16 * width
    for stage in range(3):
        out = 16 * width * 2**stage
        for _ in range((depth - 2) // 6):
            total += 9 * chs * out + 2 * out + 9 * out * out + 2 * out
            chs = out
    return total


def test_resnet32_has_463504_parameters():
    assert num_parameters(nets.make("resnet32_cifar", num_classes=0)) == 463_504


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_parameters_are_those_of_the_paper_at_every_depth(depth):
    assert num_parameters(nets.make(f"resnet{depth}_cifar", num_classes=0)) == expected_parameters(depth)


@pytest.mark.parametrize(("width", "in_chans"), [(2, 3), (3, 1)])
def test_width_multiplies_every_channel(width, in_chans):
    model = nets.make("resnet32_cifar", num_classes=0, width=width, in_chans=in_chans)
    assert num_parameters(model) == expected_parameters(32, width, in_chans)
    assert [info["num_chs"] for info in model.feature_info] == [16 * width, 16 * width, 32 * width, 64 * width]


@pytest.mark.parametrize("width", [0, -1, 1.5])
def test_a_width_that_is_not_a_positive_integer_is_refused(width):
    with pytest.raises(UserError, match="positive integer"):
        make(width=width)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_with_weights(depth):
    model = nets.make(f"resnet{depth}_cifar", num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_shortcut_subsamples_and_pads_with_zero_channels_without_parameters():
    block = BasicBlock(2, 5, stride=2)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = images(size=7, in_chans=2)
    out = block(x)
    assert out.shape == (2, 5, 4, 4)
    assert_close(out[:, :2], x[:, :, ::2, ::2].relu(), rtol=0, atol=0)
    assert out[:, 2:].abs().max() == 0


def test_shortcut_of_an_unchanged_shape_is_the_input():
    block = BasicBlock(3, 3)
    x = images(size=5)
    assert block.shortcut(x) is x


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("width", [1, 2])
def test_without_classifier_the_output_is_pooled_features(size, in_chans, width):
    model = make(num_classes=0, in_chans=in_chans, width=width)
    x = images(size, in_chans)
    features = model.forward_features(x)
    assert features.shape == (2, 64 * width, size // 4, size // 4)
    assert_close(model(x), features.mean((2, 3)))
    assert (model.num_classes, model.in_chans) == (0, in_chans)
    assert model.num_features == model.head_hidden_size == 64 * width


@pytest.mark.parametrize(("pool", "width"), [("avg", 64), ("max", 64), ("avgmax", 64), ("catavgmax", 128)])
def test_global_pool_sets_the_pooled_width(pool, width):
    model = make(num_classes=0, global_pool=pool)
    assert model.num_features == 64
    assert model.head_hidden_size == model(images()).shape[1] == width


def test_feature_info_describes_what_features_only_gives():
    model = make(features_only=True, width=2)
    features = model(images())
    assert [tuple(f.shape[1:]) for f in features] == [(32, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert model.feature_info.channels() == [f.shape[1] for f in features]
    assert model.feature_info.reduction() == [32 // f.shape[2] for f in features]
