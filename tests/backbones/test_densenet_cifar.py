import pytest
import torch
from torch import nn
from torch.testing import assert_close

from etflight.backbones.densenet_cifar import CifarDenseNet, DenseLayer, Transition
from tests.backbones import nets
from tests.backbones.nets import images, num_parameters

NAME = "densenet_bc_150_cifar"


def widths(depth: int, k: int) -> list[int]:
    """Channels after stem and stages as the released code computes them: floats, truncated where it truncates."""
    layers, chs = int((depth - 4) / 3 / 2), 2 * k
    found = [chs]
    for stage in range(3):
        chs = int(chs * 0.5) if stage else chs
        found.append(chs := int(chs + layers * k))
    return found


def expected_parameters(depth: int, k: int, in_chans: int) -> int:
    """Every convolution and every BatchNorm, counted one by one."""
    layers, chs = (depth - 4) // 6, 2 * k
    total = 9 * in_chans * chs
    for stage in range(3):
        if stage:
            total += 2 * chs + chs * (chs // 2)
            chs //= 2
        for _ in range(layers):
            total += 2 * chs + chs * 4 * k + 2 * 4 * k + 9 * 4 * k * k
            chs += k
    return total + 2 * chs


def test_depth_150_at_growth_12_has_510_features():
    assert widths(150, 12) == [
        24,
        312,
        444,
        510,
    ]  # 2k channels at the start; with 16, as without compression, it is 508
    model = nets.make(NAME, num_classes=0)
    assert [info["num_chs"] for info in model.feature_info] == [24, 312, 444, 510]
    assert model.num_features == model.head_hidden_size == model(images(8)).shape[1] == 510


@pytest.mark.parametrize("in_chans", [1, 3])
def test_parameters_are_those_of_the_paper(in_chans):
    model = nets.make(NAME, num_classes=0, in_chans=in_chans)
    assert num_parameters(model) == expected_parameters(150, 12, in_chans)
    assert model(images(8, in_chans)).shape == (2, 510)


def test_the_networks_of_the_paper_have_its_sizes():
    # table 2: DenseNet-BC, 0.8 M parameters at depth 100 and k = 12, 15.3 M at 250 and 24
    assert round(num_parameters(CifarDenseNet(100, 12)) / 1e6, 1) == 0.8
    assert round(expected_parameters(250, 24, 3) / 1e6, 1) == 15.3


def test_a_depth_that_fits_no_stages_is_rounded_down():
    model = nets.make(NAME, num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 148
    assert [len([m for m in model.get_submodule(f"layer{i}") if isinstance(m, DenseLayer)]) for i in (1, 2, 3)] == [
        24
    ] * 3


def test_a_layer_puts_its_channels_behind_those_it_read():
    layer = DenseLayer(5, 3).eval()
    assert [layer.conv1.out_channels, layer.conv2.out_channels] == [12, 3]  # the bottleneck has 4k
    x = images(size=6, in_chans=5)
    out = layer(x)
    assert_close(out[:, :5], x, rtol=0, atol=0)
    bottleneck = layer.conv1(layer.bn1(x).relu())
    assert_close(out[:, 5:], layer.conv2(layer.bn2(bottleneck).relu()))


def test_a_transition_averages_two_by_two_pixels():
    transition = Transition(4, 2).eval()
    x = images(size=6, in_chans=4)
    pixels = transition.conv(transition.bn(x).relu())
    assert_close(transition(x), pixels.reshape(2, 2, 3, 2, 3, 2).mean((3, 5)))


def test_the_stem_neither_strides_nor_pools_and_features_are_not_negative():
    model, x = nets.make(NAME, num_classes=0), images()
    final, (stem, *_) = model.forward_intermediates(x)
    assert_close(stem, model.conv1(x), rtol=0, atol=0)
    assert stem.shape == (2, 24, 32, 32)
    assert final.shape == (2, 510, 8, 8)
    assert final.min() == 0  # BN-ReLU closes the last stage


def test_feature_info_describes_what_features_only_gives():
    model = nets.make(NAME, features_only=True)
    features = model(images(16))
    assert [tuple(f.shape[1:]) for f in features] == [(24, 16, 16), (312, 16, 16), (444, 8, 8), (510, 4, 4)]
    assert model.feature_info.channels() == [f.shape[1] for f in features]
    assert model.feature_info.reduction() == [16 // f.shape[2] for f in features]


def test_every_parameter_gets_a_gradient():
    model = nets.make(NAME, num_classes=3).train()
    torch.nn.functional.cross_entropy(model(images(8)), torch.tensor([0, 2])).backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if name.endswith("conv2.weight"))
