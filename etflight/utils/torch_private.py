"""Private names of torch, each in one small function."""

from torch import Tensor, nn


def broadcast_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers that DDP broadcasts: all but those named in `_ddp_params_and_buffers_to_ignore`."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    return [buffer for name, buffer in module.named_buffers() if name not in ignored]
