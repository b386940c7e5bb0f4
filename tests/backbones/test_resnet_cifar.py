from functools import partial

import pytest
from torch import nn
from torch.testing import assert_close

from etflight.backbones.resnet_cifar import BasicBlock
from etflight.utils.errors import UserError
from tests.backbones import nets
from tests.backbones.nets import images, num_parameters

make = partial(nets.make, num_classes=0)


def expected_parameters(depth: int, width: int = 1, in_chans: int = 3) -> int:
    """Every convolution and its BatchNorm, counted from the paper's table."""
    chs, total = 16 * width, 9 * in_chans * 16 * width + 2 * 16 * width
    for stage in range(3):
        out = 16 * width * 2**stage
        for _ in range((depth - 2) // 6):
            total += 9 * chs * out + 2 * out + 9 * out * out + 2 * out
            chs = out
    return total


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_layers_and_parameters_are_those_of_the_paper(depth):
    model = make(f"resnet{depth}_cifar")
    assert num_parameters(model) == expected_parameters(depth)
    assert sum(isinstance(m, nn.Conv2d) for m in model.modules()) == depth - 1  # the last layer is the classifier
    assert expected_parameters(32) == 463_504


@pytest.mark.parametrize(("width", "in_chans"), [(2, 3), (3, 1)])
def test_width_multiplies_every_channel(width, in_chans):
    model = make("resnet32_cifar", width=width, in_chans=in_chans)
    assert num_parameters(model) == expected_parameters(32, width, in_chans)
    assert [info["num_chs"] for info in model.feature_info] == [16 * width, 16 * width, 32 * width, 64 * width]


@pytest.mark.parametrize("width", [0, 1.5])
def test_a_width_that_is_not_a_positive_integer_is_refused(width):
    with pytest.raises(UserError, match="positive integer"):
        make("resnet20_cifar", width=width)


def test_shortcut_subsamples_and_pads_with_zero_channels_without_parameters():
    block = BasicBlock(2, 5, stride=2)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = images(size=7, in_chans=2)
    out = block(x)
    assert out.shape == (2, 5, 4, 4)
    assert_close(out[:, :2], x[:, :, ::2, ::2].relu(), rtol=0, atol=0)
    assert out[:, 2:].abs().max() == 0
    assert BasicBlock(2, 2).shortcut(x) is x


@pytest.mark.parametrize(("size", "in_chans", "width"), [(8, 1, 1), (28, 1, 2), (32, 3, 1)])
def test_three_stages_quarter_the_resolution(size, in_chans, width):
    model = make("resnet20_cifar", in_chans=in_chans, width=width)
    assert model.forward_features(images(size, in_chans)).shape == (2, 64 * width, size // 4, size // 4)
    assert model.num_features == model.head_hidden_size == 64 * width
