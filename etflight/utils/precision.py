"""Conversion for values that are never computed in half precision, whatever the network's precision."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 values unchanged, and all others in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
