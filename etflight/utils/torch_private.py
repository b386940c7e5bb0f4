"""Private names of torch, each in one small function."""

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def broadcast_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that DDP broadcasts: all but those named in `_ddp_params_and_buffers_to_ignore`."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    return [buffer for name, buffer in module.named_buffers() if name not in ignored]


def leave_out_of_broadcasts(module: nn.Module, buffers: list[str]) -> None:
    """Keep DDP from broadcasting some buffers of a module, given by name.

    Touches `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model`.
    """
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, buffers)  # type: ignore[no-untyped-call]
