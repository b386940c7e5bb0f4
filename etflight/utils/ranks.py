"""What all processes of a job share: buffers, and BatchNorm over the images of all of them."""

import torch.distributed as dist
from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
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


class SyncBatchNorm(TorchSyncBatchNorm):
    """Lightning's `sync_batchnorm`, but a layer that normalises and activates in one keeps its activation.

    EfficientNets, DenseNets and many more of timm's have such layers. torch's own conversion makes plain BatchNorm of them, so that the
    network trains without activations, and nobody is told.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, sync_batchnorm=True, plugins=[SyncBatchNorm()])
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with its BatchNorm layers synchronised."""
        from timm.layers.norm_act import convert_sync_batchnorm  # timm takes a second, which `--help` need not wait for

        synced: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synced

    def revert(self, model: nn.Module) -> nn.Module:
        """The model with layers that know their own process's images only."""
        from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct

        fused = [name for name, module in model.named_modules() if isinstance(module, SyncBatchNormAct)]
        model = super().revert(model)
        for name in fused:
            # Lightning has made a BatchNorm of it that still holds, but does not call, what follows
            model.get_submodule(name).__class__ = BatchNormAct2d
        return model
