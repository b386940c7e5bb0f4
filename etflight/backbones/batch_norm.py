"""BatchNorm over the images of all processes, for every layer that timm knows."""

from lightning.pytorch.plugins.layer_sync import TorchSyncBatchNorm
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn


class SyncBatchNorm(TorchSyncBatchNorm):
    """Lightning's `sync_batchnorm`, but a layer that normalises and activates in one keeps its activation.

    EfficientNets, DenseNets and many other models of timm have such layers. torch's own conversion turns them into plain BatchNorm, so that
    the network silently trains without activations.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(accelerator="cpu", logger=False, sync_batchnorm=True, plugins=[SyncBatchNorm()])
    """

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with its BatchNorm layers synchronised."""
        synced: nn.Module = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return synced

    def revert(self, model: nn.Module) -> nn.Module:
        """The model with BatchNorm layers that see only their own process's images."""
        fused = [name for name, module in model.named_modules() if isinstance(module, SyncBatchNormAct)]
        model = super().revert(model)
        for name in fused:
            # Lightning has turned it into a BatchNorm that still holds its activation, but does not call it
            model.get_submodule(name).__class__ = BatchNormAct2d
        return model
