"""Making a model of a checkpoint, and what must be equal where a checkpoint's training goes on."""

from collections.abc import Collection, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypeVar, cast

from lightning.pytorch import LightningModule

from etflight.checkpoint.files import read_checkpoint, refuse_others
from etflight.checkpoint.hyperparameters import Pluggable, fixed_by, make_with, plain_hyperparameters
from etflight.checkpoint.specs import objections
from etflight.checkpoint.weights_to_come import weights_come_next
from etflight.utils.errors import UserError, argument, brief

Model = TypeVar("Model", bound=LightningModule)
# what a run may change when it is resumed: none of it is part of a training step's mathematics
_FREE_WHEN_RESUMED = {"compile", "logit_adjustment", "adjustment", "pretrained", "num_classes", "in_chans"}
_ARCHITECTURE = ("backbone", "model_kwargs", "head")


def load_model(cls: type[Model], path: str | Path, map_location: Any, strict: bool, given: Mapping[str, Any]) -> Model:
    """Make a model of a checkpoint; nothing in the file can import or run code.

    Args:
        cls: The class of the model, a `Pluggable`.
        path: The file.
        map_location: The device for the tensors.
        strict: Whether all weights must match.
        given: Arguments that replace the saved ones.

    Raises:
        UserError: The file cannot be read, or names a class which is not imported.
    """
    checkpoint = read_checkpoint(path, map_location)
    state = checkpoint["state_dict"]
    for name in fixed_by(cls):
        checkpoint["hyper_parameters"].pop(name, None)
    refuse_others(path, checkpoint, cls)
    named = objections({"class_path": cls.__name__, "init_args": {}}, f"checkpoint {path}")
    # class vectors that the file lacks are an error if all weights must match, and else must be computed
    with weights_come_next() if strict or "head.weight" in state else nullcontext(), named:
        model = make_with(cls, plain_hyperparameters(checkpoint, cast(type[Pluggable], cls), given), given)
    model.on_load_checkpoint(checkpoint)
    model.load_state_dict(state, strict=strict)
    return model.to(next(iter(state.values())).device)


def counts_of_training(checkpoint: Mapping[str, Any]) -> list[int]:
    """The number of images of each class that a checkpoint's model was trained on; empty if it has none."""
    counts = checkpoint["state_dict"].get("class_counts")
    return [] if counts is None else counts.flatten().tolist()


def refuse_other_training(
    checkpoint: Mapping[str, Any], differing: Collection[str], images_differ: str | None, length: int | None
) -> None:
    """Refuse to go on with a checkpoint's training by other settings than its own.

    Args:
        checkpoint: The content.
        differing: The names of the arguments in which the model differs from the checkpoint's.
        images_differ: How the images differ, in a sentence; None if they do not.
        length: The number of epochs for which the schedule is made; None if it does not depend on it.

    Raises:
        UserError: Something differs that a step of the training depends on.
    """
    if images_differ:
        raise UserError(
            f"{images_differ}: give the same {argument('data')} options to resume the run, or start a new one"
        )
    if other := sorted(set(differing) - _FREE_WHEN_RESUMED):
        raise UserError(
            f"{argument(f'model.{other[0]}')} differs from that of the run being resumed: give the same, or start a new run, "
            f"with the checkpoint as its {argument('fine_tuning.checkpoint')} if it is to have these weights"
        )
    epochs = checkpoint.get("total_epochs")
    if None not in (length, epochs) and epochs != length:
        raise UserError(
            f"the schedule of the checkpoint being resumed was made for {epochs} epochs, and its saved state would undo another "
            f"length: give {argument('trainer.max_epochs', epochs)}, or start a new run from scratch"
        )


def other_weights(error: RuntimeError, differing: Collection[str]) -> UserError:
    """Make the error for weights that do not fit into a model.

    Args:
        error: What torch says.
        differing: The names of the arguments in which the model differs from the checkpoint's.
    """
    other = [argument(f"model.{name}") for name in _ARCHITECTURE if name in differing]
    what = f"other than {' and '.join(other)} says" if other else brief(error, 300)
    return UserError(f"the checkpoint's weights are those of another model: {what}")
