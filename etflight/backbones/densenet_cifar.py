"""Densely connected network for 32 × 32 images, registered in timm as `densenet_bc_150_cifar`."""

from typing import Any

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from etflight.backbones.cifar import CifarNet, build_cifar, cifar_cfg


class DenseLayer(nn.Module):
    """BN-ReLU-convolution 1 × 1 to 4k channels, the same 3 × 3 to k channels, which are appended to the input's.

    Args:
        in_chs: Channels of the input, C.
        growth_rate: New channels, k.
    """

    def __init__(self, in_chs: int, growth_rate: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_chs, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate)
        self.act2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, C + k, H, W]`."""
        bottleneck = self.conv1(self.act1(self.bn1(x)))
        return torch.cat([x, self.conv2(self.act2(self.bn2(bottleneck)))], 1)


class Transition(nn.Sequential):
    """BN-ReLU-convolution 1 × 1, then the mean of 2 × 2 pixels: `[B, in_chs, H, W]` to `[B, out_chs, ⌊H/2⌋, ⌊W/2⌋]`.

    Args:
        in_chs: Channels of the input.
        out_chs: Channels of the output.
    """

    def __init__(self, in_chs: int, out_chs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(in_chs)
        self.act = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class CifarDenseNet(CifarNet):
    """The DenseNet-BC for CIFAR: a 3 × 3 stem of 2k channels and three stages of n layers, each of which adds k channels.

    A transition between two stages halves the channels (compression 0.5) and the resolution. A depth of 6n + 4 has n layers in
    each stage; any other is rounded down to one of this form, as in the released code of Yang et al. 2022: its "depth 150" at k = 12 has
    n = ⌊146/6⌋ = 24, 148 layers with weights, and 24 + 24·12 = 312 → 156, + 288 = 444 → 222, + 288 = 510 features.
    Weights start from the fan-out, as they do there.

    Reference: Huang, Liu, van der Maaten, Weinberger, "Densely Connected Convolutional Networks", CVPR 2017, section 3,
    <https://arxiv.org/abs/1608.06993>.

    Args:
        depth: Layers with weights, classifier and transitions included.
        growth_rate: Channels that a layer adds, k.
        num_classes: Outputs of the linear classifier; 0 leaves it out, and the model returns pooled features.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling: `avg`, `max`, `avgmax`, `catavgmax`, or empty for none.
        drop_rate: Probability of dropout between pooling and classifier.
    """

    fan = "fan_out"

    def __init__(
        self,
        depth: int,
        growth_rate: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
    ) -> None:
        layers = (depth - 4) // 6
        chs = 2 * growth_rate
        stem = {"conv1": nn.Conv2d(in_chans, chs, 3, padding=1, bias=False)}
        stages, channels = [], []
        for index in range(3):
            stage = nn.Sequential()
            if index > 0:
                stage.append(Transition(chs, chs // 2))
                chs //= 2
            for _ in range(layers):
                stage.append(DenseLayer(chs, growth_rate))
                chs += growth_rate
            stages.append(stage)
            channels.append(chs)
        stages[-1].append(nn.Sequential(nn.BatchNorm2d(chs), nn.ReLU(inplace=True)))
        super().__init__(stem, stages, channels, num_classes, in_chans, global_pool, drop_rate)


default_cfgs = generate_default_cfgs({"densenet_bc_150_cifar": cifar_cfg()})


@register_model
def densenet_bc_150_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """DenseNet-BC of nominal depth 150 and growth rate 12, 1.5 M parameters."""
    return build_cifar(CifarDenseNet, "densenet_bc_150_cifar", pretrained, depth=150, growth_rate=12, **kwargs)
