import pytest
import torch
from torch import nn
from torch.testing import assert_close

from etflight.backbones.densenet_cifar import CifarDenseNet, DenseLayer, Transition
from tests.backbones.nets import images, make, num_parameters

NAME = "densenet_bc_150_cifar"


@pytest.mark.parametrize(("depth", "k", "millions"), [(100, 12, 0.8), (250, 24, 15.3)])
def test_sizes_are_those_of_the_paper(depth, k, millions):
    """Table 2, DenseNet-BC."""
    with torch.device("meta"):
        assert round(num_parameters(CifarDenseNet(depth, k)) / 1e6, 1) == millions


def test_depth_150_is_rounded_down_to_24_layers_in_each_stage_and_510_features_as_in_the_released_code():
    model = make(NAME, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 148
    stages = (model.layer1, model.layer2, model.layer3)
    assert [sum(isinstance(m, DenseLayer) for m in stage) for stage in stages] == [24, 24, 24]
    assert [info["num_chs"] for info in model.feature_info] == [24, 312, 444, 510]


def test_a_layer_puts_its_channels_behind_those_it_read():
    layer = DenseLayer(5, 3).eval()
    x = images(size=6, in_chans=5)
    out = layer(x)
    assert_close(out[:, :5], x, rtol=0, atol=0)
    bottleneck = layer.conv1(layer.bn1(x).relu())
    assert bottleneck.shape[1] == 12  # 4k
    assert_close(out[:, 5:], layer.conv2(layer.bn2(bottleneck).relu()))


def test_a_transition_averages_two_by_two_pixels():
    transition = Transition(4, 2).eval()
    x = images(size=6, in_chans=4)
    pixels = transition.conv(transition.bn(x).relu())
    assert_close(transition(x), pixels.reshape(2, 2, 3, 2, 3, 2).mean((3, 5)))


def test_the_stem_neither_strides_nor_pools_and_features_are_not_negative():
    stem, *_, final = make(NAME, features_only=True)(images(16))
    assert stem.shape == (2, 24, 16, 16)
    assert final.min() == 0  # BN-ReLU closes the last stage
