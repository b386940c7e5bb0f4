"""What a network costs: its parameters, and the multiply-adds of one image."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from etflight.utils.errors import let_through


class Cost(NamedTuple):
    """The size of a network and the work of its forward pass.

    Attributes:
        params: The number of parameters, trained or frozen; fixed class vectors are not counted.
        multiply_adds: The number of multiply-adds in the matrix products and convolutions of one image; None if it cannot be counted
            without computing.
    """

    params: int
    multiply_adds: int | None

    def __str__(self) -> str:
        """Both for people, such as "0.46 million parameters, 69 million multiply-adds an image"."""
        parts = [f"{self.params / 1e6:.2f} million parameters"]
        if self.multiply_adds is not None:
            parts.append(f"{self.multiply_adds / 1e6:.0f} million multiply-adds an image")
        return ", ".join(parts)


def network_cost(backbone: nn.Module, head: nn.Module, image_shape: Sequence[int]) -> Cost:
    """Count the parameters of backbone and head, and the multiply-adds of their forward pass; neither is run or changed.

    Args:
        backbone: A network from images to pooled features.
        head: The head on these features, with their number as `in_features`.
        image_shape: The shape `[C, H, W]` of an image.
    """
    params = sum(parameter.numel() for part in (backbone, head) for parameter in part.parameters())
    counter = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), counter:
            # tensors without numbers, so that nothing is computed
            dtype = next((parameter.dtype for parameter in backbone.parameters()), torch.float32)
            copy.deepcopy(backbone).to("meta").eval()(torch.zeros(1, *image_shape, dtype=dtype, device="meta"))
            weight = cast(torch.Tensor, head.weight)
            features = torch.zeros(1, cast(int, head.in_features), dtype=dtype, device=weight.device)
            copy.deepcopy(head).eval()(features)
    # images of this size do not fit, for one: training says so
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        let_through(error)
        return Cost(params, None)
    return Cost(params, counter.get_total_flops() // 2)
