"""Training that starts from another run's weights, with parts of the model frozen: the second of two stages."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from etflight.callbacks.embedding_source import find_submodule
from etflight.checkpoints import read_checkpoint
from etflight.errors import UserError


class FineTuning(Callback):
    """Starts training from parts of a checkpoint, and keeps parts of the model as they are.

    - cRT, a fresh head on a frozen backbone: `load={"backbone": "backbone"}, freeze=["backbone"]`.
    - LWS, a scale for each class of the old head: `load={"backbone": "backbone", "head": "head.linear"},
      freeze=["backbone", "head.linear"]` with `ScaledLinearHead`.

    A frozen part has no gradients, so neither weight decay nor momentum moves it, and it stays in evaluation mode, so its BatchNorm
    keeps its statistics. A resumed run takes all weights from its own checkpoint and does not ask for this one again.

    Args:
        checkpoint: that an `etflight` training wrote; with averaged weights (EMA) it is those that are taken.
        load: its parts, and the part of this model that each is for.
        freeze: parts of this model that do not train; names inside the backbone, such as "layer1", are understood, too.

    Raises:
        UserError: a checkpoint without anything to load from it, or the reverse; when training starts, a checkpoint of another kind of
            model, parts that are not there or of other shapes, or nothing left to train.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4.
    """

    def __init__(
        self, checkpoint: str | None = None, load: Mapping[str, str] | None = None, freeze: Sequence[str] = ()
    ) -> None:
        super().__init__()
        if (checkpoint is None) != (not load):
            have, lack = ("load", "checkpoint") if checkpoint is None else ("checkpoint", "load")
            raise UserError(f"fine-tuning has a {have}, but no {lack}: give --fine_tuning.{lack}, too, or neither")
        self.checkpoint = checkpoint
        self.load = dict(load or {})
        self.freeze = tuple(freeze)
        self._resumes = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze, before an optimizer or DDP asks which parameters train."""
        self._resumes = False
        if stage != "fit" or not self.freeze:
            return
        for part in self._frozen(pl_module):
            part.requires_grad_(False)
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in pl_module.parameters()]
        trained, total = sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)
        if trained == 0:
            raise UserError(f"nothing is left to train: --fine_tuning.freeze {list(self.freeze)} is the whole model")
        rank_zero_info(f"frozen: {', '.join(self.freeze)}; {trained:,} of {total:,} parameters train")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the weights are there already."""
        self._resumes = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the checkpoint's weights into the model."""
        if self.checkpoint is None or self._resumes:
            return
        content = read_checkpoint(self.checkpoint)
        _check_model(self.checkpoint, content["hyper_parameters"], pl_module.hparams)
        for source, target in self.load.items():
            state = _part(content["state_dict"], source)
            module = find_submodule(pl_module, target, "--fine_tuning.load:")
            if problem := _misfit(state, module.state_dict()):
                raise UserError(
                    f"{source} of checkpoint {self.checkpoint} does not fit {target} of this model: {problem}: "
                    "give a checkpoint of the same kind of model"
                )
            module.load_state_dict(state)
        rank_zero_info(f"weights of {', '.join(self.load)} taken from {self.checkpoint}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the frozen parts in evaluation mode; later validations give every module its own mode back."""
        for part in self._frozen(pl_module):
            part.eval()

    def _frozen(self, pl_module: LightningModule) -> list[nn.Module]:
        return [find_submodule(pl_module, name, "--fine_tuning.freeze:") for name in self.freeze]


def _check_model(path: str | Path, saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    for name, flag in (("num_classes", "--data"), ("backbone", "--model.backbone")):
        if name not in saved:
            raise UserError(f"checkpoint {path} is not one of a Classifier: its hyper-parameters have no {name}")
        if name in own and saved[name] != own[name]:
            raise UserError(
                f"checkpoint {path} has the {name} {saved[name]}, this model {own[name]}: "
                f"give the {flag} it was trained with, or another checkpoint"
            )


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}


def _misfit(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """What keeps a state dict from being loaded, if anything does."""
    if not given:
        return "the checkpoint has no such part"
    for key in own:
        if key not in given:
            return f"it has no {key}"
        if given[key].shape != own[key].shape:
            return f"its {key} is {list(given[key].shape)}, not {list(own[key].shape)}"
    surplus = sorted(given.keys() - own.keys())
    return f"it has a {surplus[0]}, which has no place here" if surplus else None
