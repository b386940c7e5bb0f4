"""Values and products that are never computed in half precision, whatever the network's precision."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 values unchanged, and all others in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast on the device, which may be one that has none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def exact_product(embedding: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits `[B, K]` of embeddings `[B, d]` and class vectors `[K, d]`, in the precision of the embeddings."""
    with no_autocast(embedding.device):
        return embedding @ weight.T.to(embedding.dtype)
