"""Values and products that are never computed in half precision, where float64 can be had, and rows that are no numbers."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from etflight.utils.errors import UserError


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


def refuse_not_finite(what: str, rows: Tensor) -> None:
    """Refuse vectors with which nothing can be compared: a score of them would be a number that means nothing.

    Args:
        what: The name of the vectors, in the plural.
        rows: The vectors `[N, d]`.

    Raises:
        UserError: Some of them hold NaN or infinity, or are so large that their norm is infinite.
    """
    norms = torch.linalg.vector_norm(rows.detach().to(with_float64(rows.device)), dim=1, dtype=torch.float64)
    _refuse_rows(what, norms.isfinite())


def finite_logits(logits: Tensor) -> Tensor:
    """Return logits `[N, K]` in float64; a logit of minus infinity rules its class out.

    Raises:
        UserError: A row holds NaN or plus infinity, or rules all classes out.
    """
    logits = in_float64(logits)
    _refuse_rows("logits", logits.amax(dim=1).isfinite())
    return logits


def _refuse_rows(what: str, fine: Tensor) -> None:
    broken = (~fine).nonzero().flatten().tolist()
    if broken:
        raise UserError(
            f"{len(broken)} of {len(fine)} {what} are NaN or infinite, the first is row {broken[0]}: leave them out, or find the cause, "
            "such as a damaged image, half precision or weights that diverged"
        )


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block without autocast on the device, which may be one that has none."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def exact_product(embedding: Tensor, weight: Tensor) -> Tensor:
    """Compute the logits `[B, K]` of embeddings `[B, d]` and class vectors `[K, d]`, in the precision of the embeddings."""
    with no_autocast(embedding.device):
        return embedding @ weight.T.to(embedding.dtype)
