"""A trained model from its run folder or checkpoint, with the decision that was tested and the images of its training."""

from argparse import ArgumentError
from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser

from etflight.callbacks import PostHoc
from etflight.callbacks.temperature import decided
from etflight.checkpoint.specs import from_spec, to_spec
from etflight.classifier import Classifier
from etflight.data import ImageDataModule
from etflight.data.preprocessing import Preprocessing
from etflight.data.run_options import data_section, prepare_as_trained, refuse_imports
from etflight.runs.folder import CONFIG, checkpoint_of, last_checkpoint, read_record, run_of
from etflight.utils.errors import UserError, brief, user_error_in
from etflight.utils.yaml import read_yaml

ADJUSTMENT = ("logit_adjustment", "adjustment")  # the model's options that adjust its logits


def load(run: str | Path) -> Classifier:
    """Load a trained model with its decision, class names and preprocessing.

    Args:
        run: A run folder, whose last checkpoint is meant; a checkpoint; or the folder of a run that tested another run's checkpoint with
            a decision of its own, by which the model then decides.

    Returns:
        The model, in evaluation mode, on the CPU, with averaged weights (EMA) if it has them.

    Raises:
        UserError: There is no such checkpoint, or it cannot be read; or the decision needs the images of the training, which are missing.

    Example:
        >>> model = etflight.load("runs/my_photos")  # doctest: +SKIP
        >>> names, probabilities, labels = model.predict(["cat.jpg", "dog.jpg"], top_k=3)  # doctest: +SKIP
    """
    asked = tested_decision(Path(run))
    checkpoint = checkpoint_of(asked.checkpoint)
    model = Classifier.load_from_checkpoint(checkpoint, **asked.adjustment)
    return asked.applied(model, run_of(checkpoint.absolute())).eval()


class AskedDecision(NamedTuple):
    """A checkpoint and the decision that is asked for.

    Attributes:
        checkpoint: The run folder or checkpoint of the trained model.
        folder: The folder of the run that tested it with this decision, or None.
        adjustment: The model's options `logit_adjustment` and `adjustment`, where they are given.
        method: What decides in place of the trained head, or None.
    """

    checkpoint: Path
    folder: Path | None
    adjustment: dict[str, Any]
    method: PostHoc | None

    @property
    def is_another(self) -> bool:
        """Whether another decision than the checkpoint's may be asked for."""
        return bool(self.adjustment) or self.method is not None

    def applied(self, model: Classifier, run: Path | None, data: ImageDataModule | None = None) -> Classifier:
        """The classifier that decides so.

        Args:
            model: The trained model, loaded with `adjustment`.
            run: The folder of the run that trained it, or None.
            data: The images of the training; None: as the run's configuration tells.

        Raises:
            UserError: The decision needs these images, and they cannot be told.
        """
        if not self.is_another:
            return model
        needs = type(self.method).__name__ if self.method is not None and self.method.needs_training_data else None
        data = data or images_of_training(run, model.preprocessing, needs)
        shape = None if model.preprocessing is None else model.preprocessing.input_size
        if self.method is not None:
            return self.method.applied(model, data, shape)
        return decided(model, data, shape) if shape else model


def tested_decision(run: Path) -> AskedDecision:
    """The decision by which a run has tested: that of its own checkpoint, or another for the checkpoint of a trained run.

    Args:
        run: A run folder, or a checkpoint.

    Raises:
        UserError: The run's files are not whole, or name a method that has not been imported.
    """
    tested = read_record(run).get("checkpoint") if run.is_dir() and not last_checkpoint(run).is_file() else None
    if not isinstance(tested, str):
        return AskedDecision(run, None, {}, None)
    config = run / CONFIG
    content: Any = read_yaml(config)
    model, spec = (content.get(key) if isinstance(content, dict) else None for key in ("model", "post_hoc"))
    if not isinstance(model, dict) or not Path(tested).is_file():
        raise UserError(
            f"{run} tested {tested}, which is gone, or its {CONFIG} is not whole: give the run of the model"
        )
    method = None if spec is None else from_spec(to_spec(spec, "post_hoc"), PostHoc, f"{config}: post_hoc")()
    return AskedDecision(Path(tested), run, {name: model[name] for name in ADJUSTMENT if name in model}, method)


def images_of_training(
    run: Path | None, known: Preprocessing | None, needed_by: str | None = None
) -> ImageDataModule | None:
    """The images of the training in a run folder, as its `config.yaml` describes them; None if they cannot be told and nothing needs them.

    Args:
        run: The run folder of the checkpoint, or None.
        known: What the checkpoint knows of its images, or None.
        needed_by: The name of what decides in place of the trained head and needs them, or None.

    Raises:
        UserError: They are needed, and cannot be told.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(ImageDataModule, "data", required=True)
    try:
        if run is None or not (run / CONFIG).is_file():
            raise UserError(f"the checkpoint is not in a run folder, whose {CONFIG} tells them")
        refuse_imports(run / CONFIG)
        config = parser.parse_object(data_section(run / CONFIG))
        prepare_as_trained(config.data, known)
        data: ImageDataModule = parser.instantiate(config).data
        data.prepare_data()
    except (ArgumentError, TypeError, ValueError) as error:
        if needed_by is None:
            return None
        reason = brief(user_error_in(error) or error, 500)
        raise UserError(f"{needed_by} needs the images of the training: {reason}") from error
    return data
