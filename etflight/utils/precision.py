"""Values and products that are never computed in half precision, whatever the network's precision, and where float64 can be had."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Return float64 values unchanged, and all others in float32."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has float64; Apple's MPS has none."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except TypeError:
        return False
    return True


def with_float64(device: torch.device) -> torch.device:
    """Return the device, or the CPU in place of one that has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def in_float64(values: Tensor) -> Tensor:
    """Return the values in float64, on the CPU if their device has none."""
    # in two steps, because a device without float64 cannot copy to it either
    return values.to(with_float64(values.device)).double()


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast on the device, which may be one that has none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def exact_product(embedding: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits `[B, K]` of embeddings `[B, d]` and class vectors `[K, d]`, in the precision of the embeddings."""
    with no_autocast(embedding.device):
        return embedding @ weight.T.to(embedding.dtype)
