"""What the networks for 32 × 32 images share: a stem, three stages, pooling and a classifier, under timm's model contract."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg
from torch import Tensor, nn

_STAGES = ("layer1", "layer2", "layer3")


class CifarNet(nn.Module):
    """A network whose stages `layer1`, `layer2` and `layer3` work at full, half and a quarter of the resolution.

    Convolutions start from He's normal distribution over `fan`. `num_features`, `forward_features`,
    `forward_head`, `get_classifier` and `reset_classifier` are as in timm's models.

    Args:
        stem: Modules by name that run one after another; the first is the convolution `conv1`.
        stages: The blocks of each stage.
        channels: Channels at the end of each stage.
        num_classes: Outputs of the linear classifier; 0 leaves it out, and the model returns pooled features.
        in_chans: Channels of the images.
        global_pool: timm's name of the pooling: `avg`, `max`, `avgmax`, `catavgmax`, or empty for none.
        drop_rate: Probability of dropout between pooling and classifier.

    Attributes:
        fan: `fan_in` or `fan_out`: the connections that set the variance of a convolution's first weights.
    """

    conv1: nn.Conv2d
    global_pool: Any
    fan: ClassVar[Literal["fan_in", "fan_out"]]

    def __init__(
        self,
        stem: Mapping[str, nn.Module],
        stages: Sequence[nn.Sequential],
        channels: Sequence[int],
        num_classes: int,
        in_chans: int,
        global_pool: str,
        drop_rate: float,
    ) -> None:
        super().__init__()
        self.in_chans = in_chans
        self.drop_rate = drop_rate

        for name, module in stem.items():
            self.add_module(name, module)
        self._stem_names = tuple(stem)
        self.feature_info: list[dict[str, Any]] = [
            {"num_chs": self.conv1.out_channels, "reduction": 1, "module": self._stem_names[-1]}
        ]
        for i, (name, stage, chs) in enumerate(zip(_STAGES, stages, channels, strict=True)):
            self.add_module(name, stage)
            self.feature_info.append({"num_chs": chs, "reduction": 2**i, "module": name})

        self.num_features = channels[-1]
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode=self.fan, nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters by depth, per stage if `coarse`, else per block."""
        stem = "|".join(self._stem_names)
        return {"stem": rf"^(?:{stem})\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or the name of its attribute."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier on the same device; the pooling stays unless `global_pool` names another."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.global_pool, self.fc = pool.train(self.training), fc.to(self.conv1.weight).train(self.training)
        self.head_hidden_size: int = self.num_features * pool.feat_mult()

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to features `[B, num_features, ⌈H/4⌉, ⌈W/4⌉]`; DenseNets round down."""
        for name in (*self._stem_names, *_STAGES):
            x = self.get_submodule(name)(x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits `[B, num_classes]`, or to the pooled features `[B, head_hidden_size]` before them."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to logits `[B, num_classes]`, or pooled features without a classifier."""
        return self.forward_head(self.forward_features(x))


def cifar_cfg() -> dict[str, Any]:
    """What timm wants to know of such a network, where it differs from timm's defaults."""
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": (0.4914, 0.4822, 0.4465),  # the pixels of CIFAR-10's training set
        "std": (0.2470, 0.2435, 0.2616),
        "first_conv": "conv1",
        "classifier": "fc",
    }


def build_cifar(network: type[CifarNet], name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """Build a registered network as timm builds its own, with `feature_info` of the stem and the three stages."""
    model: nn.Module = build_model_with_cfg(
        network, name, pretrained, feature_cfg={"out_indices": (0, 1, 2, 3)}, **kwargs
    )
    return model
