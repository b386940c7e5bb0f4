from functools import partial

import pytest
from torch import nn
from torch.testing import assert_close

from etflight.backbones.resnet_cifar import BasicBlock
from etflight.utils.errors import UserError
from tests.backbones import nets
from tests.backbones.nets import images, num_parameters

make = partial(nets.make, num_classes=0)


@pytest.mark.parametrize(
    ("depth", "width", "millions"),
    [(20, 1, 0.27), (32, 1, 0.46), (44, 1, 0.66), (56, 1, 0.85), (110, 1, 1.73), (32, 4, 7.39)],
)
def test_layers_and_parameters_are_those_of_the_paper(depth, width, millions):
    """Table 6 of the paper has the width 1."""
    model = make(f"resnet{depth}_cifar", num_classes=10, width=width)
    assert num_parameters(model) / 1e6 == pytest.approx(millions, abs=0.006)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth
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
