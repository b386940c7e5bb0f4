"""Which decision a command takes: that of the checkpoint, of a run that tested it in another way, or of the command line."""

from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from etflight.callbacks import PostHoc
from etflight.callbacks.temperature import decided
from etflight.checkpoint.specs import from_spec, to_spec
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import folder_of, images_of_training, load_classifier
from etflight.cli.data_option import existing
from etflight.data import ImageDataModule
from etflight.decision import Adjustment
from etflight.runs.folder import last_checkpoint, read_record, run_of
from etflight.utils.errors import UserError
from etflight.utils.yaml import read_yaml

_ADJUSTMENT = ("logit_adjustment", "adjustment")


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


def add_decision(parser: ArgumentParser) -> None:
    """Add `--model.logit_adjustment`, `--model.adjustment` and `--post_hoc`."""
    parser.add_argument(
        "--model.logit_adjustment",
        type=float | None,
        default=None,
        help="Decide by adjusted logits, as in etflight test.",
    )
    parser.add_argument("--model.adjustment", type=Adjustment | None, default=None, help="additive or multiplicative.")
    parser.add_argument(
        "--post_hoc",
        type=PostHoc | None,
        default=None,
        help="What decides in place of the trained head: TauNormalization, NearestClassMean.",
    )


def asked_decision(config: Namespace) -> AskedDecision:
    """The decision of a command line with `run` and the options of `add_decision`; those beat what a run says.

    Raises:
        UserError: The run's files are not whole, or name a method that has not been imported.
    """
    tested = tested_decision(Path(config.run))
    given = {name: value for name in _ADJUSTMENT if (value := config.model[name]) is not None}
    method = None if config.post_hoc is None else _method(config.post_hoc.as_dict(), "post_hoc")
    folder = None if given or method else tested.folder
    return AskedDecision(tested.checkpoint, folder, tested.adjustment | given, method or tested.method)


def tested_decision(run: Path) -> AskedDecision:
    """The decision of a run: that of its checkpoint, or the one with which it tested another run's.

    Args:
        run: A run folder, or a checkpoint.

    Raises:
        UserError: The run's files are not whole, or name a method that has not been imported.
    """
    tested = read_record(run).get("checkpoint") if run.is_dir() and not last_checkpoint(run).is_file() else None
    if not isinstance(tested, str):
        return AskedDecision(run, None, {}, None)
    content: Any = read_yaml(run / "config.yaml")
    model, spec = (content.get(key) if isinstance(content, dict) else None for key in ("model", "post_hoc"))
    if not isinstance(model, dict) or not Path(tested).is_file():
        raise UserError(
            f"{run} tested {tested}, which is gone, or its config.yaml is not whole: give the run of the model"
        )
    method = None if spec is None else _method(spec, f"{run / 'config.yaml'}: post_hoc")
    return AskedDecision(Path(tested), run, {name: model[name] for name in _ADJUSTMENT if name in model}, method)


def _method(spec: Any, where: str) -> PostHoc:
    method: PostHoc = from_spec(to_spec(spec, "post_hoc"), PostHoc, where)()
    return method


def with_decision(
    model: Classifier,
    asked: AskedDecision,
    command: str,
    input_size: tuple[int, ...],
    data: ImageDataModule | None = None,
) -> Classifier:
    """Return a loaded model as it decides, with a temperature where images were held out.

    Args:
        model: The model in the checkpoint, with the options of the decision.
        asked: The decision, another than the checkpoint's.
        command: The command, for errors.
        input_size: The shape `[C, H, W]` of its images.
        data: The images of its training; None: those that the run of the checkpoint describes.

    Raises:
        UserError: The decision needs the images of the training, which cannot be told.
    """
    method = asked.method
    needs = type(method).__name__ if method is not None and method.needs_training_data else None
    trained_in = run_of(asked.checkpoint.absolute())
    data = data or images_of_training(trained_in, model.preprocessing, command, needs)
    return (decided if method is None else method.applied)(model, data, input_size).requires_grad_(False)


class Trained(NamedTuple):
    """A trained model, as it decides.

    Attributes:
        checkpoint: The path of its checkpoint.
        model: The model, with the head that decides.
        folder: The folder for results: that of the run, or else the one that the checkpoint lies in.
        facts: For a record, what it is: the checkpoint, and what decides in place of its head.
    """

    checkpoint: Path
    model: Classifier
    folder: Path
    facts: dict[str, str]


def load_trained(run: str, command: str) -> Trained:
    """Load the model of a run, a checkpoint, or a run that tested one with another head.

    Raises:
        UserError: There is no such model, or what decides needs the images of the training, which cannot be told.
    """
    asked = tested_decision(existing(run))
    checkpoint, model = load_classifier(str(asked.checkpoint), asked.adjustment)
    facts = {"model": f"checkpoint {checkpoint.resolve()}"}
    if asked.method is None or model.preprocessing is None:
        return Trained(checkpoint, model, asked.folder or folder_of(checkpoint), facts)
    model = with_decision(model, asked, command, model.preprocessing.input_size)
    return Trained(
        checkpoint, model, asked.folder or folder_of(checkpoint), facts | {"decides": type(asked.method).__name__}
    )
