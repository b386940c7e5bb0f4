"""ResNet-50 with a last stage of twice the width, registered in timm as `resnet50_wide4`."""

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck, ResNet
from torch import nn

# where it differs from timm's defaults, which are ImageNet's
_CFG = {"pool_size": (7, 7), "interpolation": "bilinear", "first_conv": "conv1", "classifier": "fc"}
default_cfgs = generate_default_cfgs({"resnet50_wide4": _CFG})


@register_model
def resnet50_wide4(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-50 as in timm, but `layer4` has 1024 and 4096 channels instead of 512 and 2048, 63 M parameters.

    It is the backbone of the released code of Yang et al. 2022 for ImageNet-LT. Everything before `layer4` has the names and
    shapes of `resnet50`.
    """
    model: nn.Module = build_model_with_cfg(
        ResNet,
        "resnet50_wide4",
        pretrained,
        block=Bottleneck,
        layers=(3, 4, 6, 3),
        channels=(64, 128, 256, 1024),
        **kwargs,
    )
    return model
