"""What all processes of a job share."""

import torch.distributed as dist
from torch import Tensor, nn


def broadcast_buffers(module: nn.Module) -> list[Tensor]:
    """The buffers but those that DDP has been told to leave alone."""
    ignored = set(getattr(module, "_ddp_params_and_buffers_to_ignore", ()))
    return [buffer for name, buffer in module.named_buffers() if name not in ignored]


def take_buffers_of_rank_zero(module: nn.Module) -> None:
    """Overwrite `broadcast_buffers` by rank 0's; a collective call, nothing on a single process.

    BatchNorm's running statistics differ from rank to rank, and DDP does not equalise them before each evaluation: not while
    gradients accumulate, and not when averaged weights have just been swapped in.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    for buffer in broadcast_buffers(module):
        dist.broadcast(buffer, src=0)
