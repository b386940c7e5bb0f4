"""Training that starts from given weights, with parts of the model frozen for a while or for good."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from etflight.analysis.features import find_submodule
from etflight.callbacks.stored_features import train_on_features
from etflight.checkpoint import old_names
from etflight.checkpoint.files import misfit, read_checkpoint
from etflight.data.base import ImageDataModule
from etflight.data.facts import other_preprocessing
from etflight.data.preprocessing import Preprocessing
from etflight.heads import ETFHead, Head
from etflight.optim import start_momentum
from etflight.utils.errors import UserError, argument, warn
from etflight.utils.lightning_private import find_unused_parameters
from etflight.utils.trainer import GivesBack, data_module, refuse_if_never_reached

_NEAR = 0.05  # between means, or deviations, of pixels in [0, 1]; common roundings of the same differ by less


class FineTuning(GivesBack):
    """Starts training from a file of weights or parts of a checkpoint, and keeps parts of the model as they are.

    - Transfer, a fresh head that learns for 3 epochs before the backbone does: `weights="resnet50.safetensors", freeze=["backbone"],
      unfreeze_epoch=3`. `Classifier`'s `layer_decay` makes the backbone's first layers learn more slowly than its last ones.
    - cRT, a fresh head on a frozen backbone: `load={"backbone": "backbone"}, freeze=["backbone"]` with a `checkpoint`.
    - LWS, a scale for each class of the old head: `load={"backbone": "backbone", "head": "head.linear"},
      freeze=["backbone", "head.linear"]` with a `checkpoint` and `ScaledLinearHead`.
    - MiSLAS, where the old head trains too: as LWS, but with `freeze=["backbone"]` and `LabelAwareSmoothingLoss`.

    A frozen part has no gradients, so neither weight decay nor momentum moves it, and it stays in evaluation mode, so its BatchNorm
    keeps its statistics (unless `freeze_statistics` is off). A resumed run takes all weights from its own checkpoint and does not ask
    for these again. Which parts are frozen depends on the epoch alone, so a resumed run continues as if it had not stopped.

    Args:
        checkpoint: A checkpoint written by an `etflight` training; if it has averaged weights (EMA), these are used.
        load: Which part of the checkpoint goes into which part of this model.
        freeze: Parts of this model that do not train; names inside the backbone, such as "layer1", work too.
        weights: A file for the backbone, `.safetensors` or written by `torch.save`, with the names that timm gives the backbone's
            weights; its classifier is left out. Images must be normalised (`mean`, `std` of the data) like those it was trained on; a
            warning says where timm expects something else.
        unfreeze_epoch: The first epoch, counted from 0, in which the frozen parts train too; with None they never do.
        store_features: Whether a backbone that is frozen for good, its statistics too, goes over images that are not augmented only once:
            the training reads its features, which the run folder keeps in `features/`. Numbers are the same up to rounding.
        freeze_statistics: Whether frozen parts are in evaluation mode; if not, they are in training mode without gradients, so BatchNorm
            normalises by the batch and keeps updating its statistics (MiSLAS' `shift_bn`).

    Raises:
        UserError: Only one of `checkpoint` and `load` is given, or both `checkpoint` and `weights`; or `unfreeze_epoch` is below 1 or given
            without `freeze`. When training starts: checkpoint or weights belong to another kind of model, a part is missing or has another
            shape, nothing is left to train, fixed class vectors are to meet the features of a backbone that is frozen for good, with
            nothing between that could turn them, or the epoch is never reached.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4;
        Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution", ICLR 2022, arXiv 2202.10054.
    """

    def __init__(
        self,
        checkpoint: str | None = None,
        load: Mapping[str, str] | None = None,
        freeze: Sequence[str] = (),
        weights: str | None = None,
        unfreeze_epoch: int | None = None,
        freeze_statistics: bool = True,
        store_features: bool = True,
    ) -> None:
        super().__init__()
        if (checkpoint is None) != (not load):
            both = f"{argument('fine_tuning.checkpoint')} and {argument('fine_tuning.load')}"
            raise UserError(f"{both} go together: give both, or neither")
        if checkpoint is not None and weights is not None:
            either = f"{argument('fine_tuning.checkpoint')} or {argument('fine_tuning.weights')}"
            raise UserError(f"fine-tuning starts from {either}, not from both: leave one out (null)")
        if unfreeze_epoch is not None and (unfreeze_epoch < 1 or not freeze):
            raise UserError(
                f"{argument('fine_tuning.unfreeze_epoch')} is {unfreeze_epoch}: give an epoch of 1 or more, and "
                f"{argument('fine_tuning.freeze')}"
            )
        self.checkpoint = checkpoint
        self.load = {old_names.part(source): old_names.part(target) for source, target in (load or {}).items()}
        self.freeze = tuple(map(old_names.part, freeze))
        self.weights = weights
        self.unfreeze_epoch = unfreeze_epoch
        self.freeze_statistics = freeze_statistics
        self.store_features = store_features
        self._resumes = False
        self._data: ImageDataModule | None = None  # which gives features in place of images
        self._held: list[nn.Parameter] = []  # the parameters of the frozen parts that would train otherwise

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Apply a permanent freeze before an optimizer or DDP asks which parameters train, and a temporary one only afterwards."""
        self._resumes = False
        if stage != "fit" or not self.freeze:
            return
        trained = [parameter for parameter in pl_module.parameters() if parameter.requires_grad]
        frozen = {id(parameter) for part in self._frozen(pl_module) for parameter in part.parameters()}
        self._held = [parameter for parameter in trained if id(parameter) in frozen]
        total = sum(parameter.numel() for parameter in pl_module.parameters())
        rest = sum(parameter.numel() for parameter in trained if id(parameter) not in frozen)
        if rest == 0:
            raise UserError(
                f"nothing is left to train: {argument('fine_tuning.freeze', list(self.freeze))} is the whole model"
            )
        until = ""
        if self.unfreeze_epoch is None:
            for parameter in self._held:
                parameter.requires_grad_(False)
        else:
            what = argument("fine_tuning.unfreeze_epoch", self.unfreeze_epoch)
            refuse_if_never_reached(trainer, self.unfreeze_epoch, what)
            until = f" until epoch {self.unfreeze_epoch}"
            find_unused_parameters(trainer.strategy)
        rank_zero_info(f"frozen{until}: {', '.join(self.freeze)}; {rest:,} of {total:,} parameters train")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the parts train again, in another training of the same model, and the data give their images."""
        if self._data is not None:
            self._data.use_images()
            self._data = None
        for parameter in self._held:
            parameter.requires_grad_(True)
        self._held = []

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note that the checkpoint has brought all weights."""
        self._resumes = True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the given weights into the model, and let it read features where a frozen backbone would compute them again and again."""
        if not self._resumes:
            self._take_given(trainer, pl_module)
        if self.store_features and self._keeps_backbone(pl_module):
            self._data = train_on_features(trainer, pl_module)

    def _keeps_backbone(self, pl_module: LightningModule) -> bool:
        """Whether the backbone is the same function of its images in the whole training."""
        backbone = getattr(pl_module, "backbone", None)
        is_frozen = any(part is backbone for part in self._frozen(pl_module))
        return is_frozen and self.unfreeze_epoch is None and self.freeze_statistics

    def _take_given(self, trainer: Trainer, pl_module: LightningModule) -> None:
        content = None if self.checkpoint is None else read_checkpoint(self.checkpoint)
        if (why := self._why_frame_never_meets(pl_module, content)) is not None:
            if self.unfreeze_epoch is None:
                raise UserError(why)
            if trainer.is_global_zero:
                warn(f"until epoch {self.unfreeze_epoch} {why}")
        if self.weights is not None:
            self._take_weights(self.weights, pl_module)
        if self.weights is not None or pl_module.hparams.get("pretrained"):
            expected = _other_normalisation(pl_module, data_module(trainer))
            if expected and trainer.is_global_zero:
                warn(f"timm's weights expect {expected}: give these, unless your weights are others")
        if self.checkpoint is not None and content is not None:
            self._take_parts(self.checkpoint, content, pl_module)
            differ = other_preprocessing(Preprocessing.in_checkpoint(content), data_module(trainer))
            if differ and trainer.is_global_zero:
                warn(f"weights are those of checkpoint {self.checkpoint}, but {differ}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Freeze the parts; later validations restore the mode of every module."""
        is_over = self.unfreeze_epoch is not None and trainer.current_epoch >= self.unfreeze_epoch
        self._set_frozen(pl_module, not is_over)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Release the parts in their epoch."""
        if trainer.current_epoch == self.unfreeze_epoch:
            self._set_frozen(pl_module, False)
            for optimizer in trainer.optimizers:
                start_momentum(optimizer)
            rank_zero_info(f"from epoch {self.unfreeze_epoch} on {', '.join(self.freeze)} trains too")

    def _why_frame_never_meets(self, pl_module: LightningModule, content: Mapping[str, Any] | None) -> str | None:
        """Why fixed class vectors cannot meet the features of a frozen backbone, with the mend; None if they can.

        What trains then has no matrix that could turn the features, and they were not trained with these class vectors.
        """
        head, backbone = getattr(pl_module, "head", None), getattr(pl_module, "backbone", None)
        if not isinstance(head, Head) or not isinstance(backbone, nn.Module) or head.weight.requires_grad:
            return None
        frozen = {id(parameter) for part in self._frozen(pl_module) for parameter in part.parameters()}
        held = frozen.issuperset(id(parameter) for parameter in backbone.parameters())
        trained = [own for own in head.parameters() if own.requires_grad and id(own) not in frozen]
        if not held or any(own.ndim > 1 for own in trained):
            return None
        known = None if content is None else content["state_dict"].get("head.weight")
        if known is not None and known.shape == head.weight.shape and torch.allclose(known, head.weight.to(known)):
            return None
        mend = f"let the backbone train ({argument('fine_tuning.unfreeze_epoch')})"
        if isinstance(head, ETFHead):
            width = (
                f"{argument('model.head.projection_dim', head.in_features)}, or a wider one with "
                f"{argument('model.head.linear_projection', True)}"
            )
            mend = f"give {width}, or {mend}"
        name = type(head).__name__
        return f"{name} cannot learn on a frozen backbone, since nothing turns its features to the fixed class vectors: {mend}"

    def _set_frozen(self, pl_module: LightningModule, frozen: bool) -> None:
        for parameter in self._held:
            parameter.requires_grad_(not frozen)
        for part in self._frozen(pl_module):
            part.train(not (frozen and self.freeze_statistics))

    def _frozen(self, pl_module: LightningModule) -> list[nn.Module]:
        return [find_submodule(pl_module, name, f"{argument('fine_tuning.freeze')}:") for name in self.freeze]

    def _take_weights(self, path: str, pl_module: LightningModule) -> None:
        from etflight.backbones import load_weights  # timm takes a second, which `--help` need not wait for

        left_out = load_weights(find_submodule(pl_module, "backbone", f"{argument('fine_tuning.weights')}:"), path)
        classifier = f"; its classifier is left out ({', '.join(left_out)})" if left_out else ""
        rank_zero_info(f"weights of the backbone taken from {path}{classifier}")

    def _take_parts(self, path: str, content: Mapping[str, Any], pl_module: LightningModule) -> None:
        for source, target in self.load.items():
            state = _part(content["state_dict"], source)
            module = find_submodule(pl_module, target, f"{argument('fine_tuning.load')}:")
            problem = misfit(state, module.state_dict()) if state else "the checkpoint has no such part"
            if problem:
                raise UserError(
                    f"{source} of checkpoint {path} does not fit {target} of this model: {problem}: "
                    "give a checkpoint of the same kind of model"
                )
            module.load_state_dict(state)
        rank_zero_info(f"weights of {', '.join(self.load)} taken from {path}")


def _other_normalisation(model: LightningModule, data: Any) -> str | None:
    """The options that normalise images as timm says for the weights of the backbone, where the data do it otherwise; else None."""
    known = getattr(getattr(model, "backbone", None), "pretrained_cfg", None) or {}
    own = getattr(data, "preprocessing", None)
    options = []
    for name in ("mean", "std") if own is not None else ():
        expected, there = known.get(name) or (), getattr(own, name)
        near = all(abs(one - other) < _NEAR for one, other in zip(expected, there, strict=False))
        if len(expected) == len(there) and not near:
            options.append(argument(f"data.{name}", list(expected)))
    return " ".join(options) or None


def _part(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
