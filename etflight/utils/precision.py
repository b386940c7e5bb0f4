"""What is never computed in half precision, whatever the network's."""

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Float64 as it is, anything else in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
