"""Residual networks for 32 × 32 images, registered in timm as `resnet20_cifar` … `resnet110_cifar`."""

from typing import Any

import torch.nn.functional as F
from timm.layers.classifier import create_classifier
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from etflight.errors import UserError

__all__ = ["BasicBlock", "CifarResNet"]  # `register_model` adds the entry points

_STAGES = ("layer1", "layer2", "layer3")


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
        """The input at the shape of the output: `[B, C, H, W]` to `[B, out_chs, ⌈H/stride⌉, ⌈W/stride⌉]`."""
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_chs)) if self.new_chs else x

    def forward(self, x: Tensor) -> Tensor:
        """`relu(residual(x) + shortcut(x))`, `[B, out_chs, ⌈H/stride⌉, ⌈W/stride⌉]`."""
        residual = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        out: Tensor = self.act2(residual + self.shortcut(x))
        return out


class CifarResNet(nn.Module):
    """The residual network for CIFAR with 6n + 2 layers: a 3 × 3 stem and three stages of n blocks.

    The stages have 16, 32 and 64 channels times `width`, at full, half and a quarter of the resolution. Weights
    start from He's normal distribution over the fan-out. The class keeps timm's model contract, as
    `timm.models.ResNet` does.

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
        UserError: When `width` is not a positive integer.
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
        width: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(width, int) or width < 1:
            raise UserError(f"the width multiplier of a CIFAR ResNet is a positive integer, not {width!r}")
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        chs = 16 * width
        self.conv1 = nn.Conv2d(in_chans, chs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(chs)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [{"num_chs": chs, "reduction": 1, "module": "act1"}]
        for name, stride in zip(_STAGES, (1, 2, 2), strict=True):
            out_chs = chs * stride
            first = BasicBlock(chs, out_chs, stride)
            self.add_module(name, nn.Sequential(first, *(BasicBlock(out_chs, out_chs) for _ in range(blocks - 1))))
            reduction = self.feature_info[-1]["reduction"] * stride
            self.feature_info.append({"num_chs": out_chs, "reduction": reduction, "module": name})
            chs = out_chs

        self.num_features = chs
        self.global_pool, self.fc = create_classifier(chs, num_classes, pool_type=global_pool)
        self.head_hidden_size: int = chs * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions that group parameters by depth, per stage if `coarse`, else per block."""
        return {"stem": r"^(?:conv1|bn1)\.", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self.grad_checkpointing = enable

    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or the name of its attribute."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier on the same device; the pooling stays unless `global_pool` names another."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        pool, fc = create_classifier(self.num_features, num_classes, pool_type=pool_type)
        self.global_pool, self.fc = pool.train(self.training), fc.to(self.conv1.weight).train(self.training)
        self.head_hidden_size = self.num_features * pool.feat_mult()

    def _stem(self, x: Tensor) -> Tensor:
        out: Tensor = self.act1(self.bn1(self.conv1(x)))
        return out

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = self.get_submodule(name)
        out: Tensor = checkpoint_seq(stage, x) if self.grad_checkpointing else stage(x)
        return out

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Final features and those of the stem (0) and the stages (1, 2, 3).

        Args:
            x: Images `[B, in_chans, H, W]`.
            indices: Which to return: the last n if an integer, these if a list, all if None.
            norm: Part of timm's signature; a convolutional stage has no closing norm to apply.
            stop_early: Stop after the last wanted one; the final features are then those.
            output_fmt: Only `NCHW`.
            intermediates_only: Return the list alone.

        Returns:
            `(features, intermediates)`, or the intermediates, each `[B, C, H', W']` as `feature_info` says.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        x = self._stem(x)
        intermediates = [x] if 0 in take_indices else []
        for index, name in enumerate(_STAGES[:max_index] if stop_early else _STAGES, start=1):
            x = self._stage(name, x)
            if index in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last wanted intermediate, and the head that is sized for them.

        Args:
            indices: As in `forward_intermediates`.
            prune_norm: Part of timm's signature; there is no closing norm.
            prune_head: Drop pooling and classifier even when no stage goes.

        Returns:
            The indices that are kept, none of them negative.
        """
        take_indices: list[int]
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        for name in _STAGES[max_index:]:
            self.add_module(name, nn.Sequential())  # empty, so that checkpoint_seq can still walk it
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or max_index < len(_STAGES):
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images `[B, in_chans, H, W]` to features `[B, 64 * width, ⌈H/4⌉, ⌈W/4⌉]`."""
        x = self._stem(x)
        for name in _STAGES:
            x = self._stage(name, x)
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


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
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


_DEPTHS = (20, 32, 44, 56, 110)
default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar": _cfg() for depth in _DEPTHS})


def _create(depth: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        CifarResNet,
        f"resnet{depth}_cifar",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3)},
        blocks=(depth - 2) // 6,
        **kwargs,
    )
    return model


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-20, 0.27 M parameters."""
    return _create(20, pretrained, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-32, 0.46 M parameters."""
    return _create(32, pretrained, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-44, 0.66 M parameters."""
    return _create(44, pretrained, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-56, 0.85 M parameters."""
    return _create(56, pretrained, **kwargs)


@register_model
def resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """ResNet-110, 1.7 M parameters."""
    return _create(110, pretrained, **kwargs)
