"""What the tests of registered networks share."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

import etflight.backbones  # noqa: F401  registers the models


def make(name: str, *, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def images(size: int = 32, in_chans: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
