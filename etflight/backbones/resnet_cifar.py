"""Residual networks for 32 × 32 images, registered in timm as `resnet20_cifar` … `resnet110_cifar`."""

from typing import Any

import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from etflight.backbones.cifar import CifarNet, build_cifar, cifar_cfg
from etflight.utils.errors import UserError


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions around a shortcut without parameters ("option A" of He et al., section 3.3).

    Where the shape changes, the shortcut takes every second pixel and fills the new channels with zeros, so
    `[B, C, H, W]` becomes `[B, out_chs, ⌈H/2⌉, ⌈W/2⌉]`.

    Args:
        in_chs: Channels of the input, C.
        out_chs: Channels of the output, at least C.
        stride: 1, or 2 to halve the resolution.
    """

    def __init__(self, in_chs: int, out_chs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chs, out_chs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_chs)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out_chs, out_chs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_chs)
        self.act2 = nn.ReLU(inplace=True)
        self.stride = stride
        self.new_chs = out_chs - in_chs

    def shortcut(self, x: Tensor) -> Tensor:
        """The input in the shape of the output: `[B, C, H, W]` to `[B, out_chs, ⌈H/stride⌉, ⌈W/stride⌉]`."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_chs)) if self.new_chs else x

    def forward(self, x: Tensor) -> Tensor:
        """`relu(residual(x) + shortcut(x))`, `[B, out_chs, ⌈H/stride⌉, ⌈W/stride⌉]`."""
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(residual + self.shortcut(x))
        return out


class CifarResNet(CifarNet):
    """The residual network for CIFAR with 6n + 2 layers: a 3 × 3 stem and three stages of n blocks.

    The stages have 16, 32 and 64 channels times `width`, at full, half and a quarter of the resolution. Weights start as in the
    released code of LDAM-DRW, MiSLAS and Yang et al. 2022: `kaiming_normal_` with its default, the fan-in.

    Reference: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2,
    <https://arxiv.org/abs/1512.03385>.

    Args:
        blocks: Blocks per stage, n.
        num_classes: Outputs of the linear classifier; 0 leaves it out, and the model returns pooled features.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling: `avg`, `max`, `avgmax`, `catavgmax`, or empty for none.
        width: Multiplies every number of channels; the pooled features have `64 * width`.
        drop_rate: Probability of dropout between pooling and classifier.

    Raises:
        UserError: `width` is not a positive integer.
    """

    fan = "fan_in"

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        if not isinstance(width, int) or width < 1:
            raise UserError(f"the width multiplier of a CIFAR ResNet is a positive integer, not {width!r}")
        chs = 16 * width
        conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False)
        stem = {"conv1": conv1, "bn1": nn.BatchNorm2d(chs), "act1": nn.ReLU(inplace=True)}
        stages, channels = [], []
        for stride in (1, 2, 2):
            out_chs = chs * stride
            first = BasicBlock(chs, out_chs, stride)
            stages.append(nn.Sequential(first, *(BasicBlock(out_chs, out_chs) for _ in range(blocks - 1))))
            channels.append(chs := out_chs)
        super().__init__(stem, stages, channels, num_classes, in_chans, global_pool, drop_rate)


default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar": cifar_cfg() for depth in (20, 32, 44, 56, 110)})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20, 0.27 M parameters."""
    return build_cifar(CifarResNet, "resnet20_cifar", pretrained, blocks=3, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32, 0.46 M parameters."""
    return build_cifar(CifarResNet, "resnet32_cifar", pretrained, blocks=5, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44, 0.66 M parameters."""
    return build_cifar(CifarResNet, "resnet44_cifar", pretrained, blocks=7, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56, 0.85 M parameters."""
    return build_cifar(CifarResNet, "resnet56_cifar", pretrained, blocks=9, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110, 1.7 M parameters."""
    return build_cifar(CifarResNet, "resnet110_cifar", pretrained, blocks=18, **kwargs)
