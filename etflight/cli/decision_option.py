"""Which decision a command takes: that of the checkpoint, of a run that tested it in another way, or of the command line."""

from pathlib import Path
from typing import NamedTuple

from jsonargparse import ArgumentParser, Namespace

from etflight.callbacks import PostHoc
from etflight.checkpoint.specs import from_spec, to_spec
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import folder_of, load_classifier
from etflight.cli.data_option import existing
from etflight.decision import Adjustment
from etflight.loading import ADJUSTMENT, AskedDecision, tested_decision
from etflight.runs.folder import run_of


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
    given = {name: value for name in ADJUSTMENT if (value := config.model[name]) is not None}
    found = tested_decision(Path(config.run))
    if config.post_hoc is not None:
        found = found._replace(method=from_spec(to_spec(config.post_hoc.as_dict(), "post_hoc"), PostHoc, "post_hoc")())
    if given or config.post_hoc is not None:  # what the run has tested is another decision
        found = found._replace(folder=None, adjustment=found.adjustment | given)
    return found


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


def load_trained(run: str) -> Trained:
    """Load the model of a run, a checkpoint, or a run that tested one with another head.

    Raises:
        UserError: There is no such model, or what decides needs the images of the training, which cannot be told.
    """
    asked = tested_decision(existing(run))
    checkpoint, model = load_classifier(str(asked.checkpoint), asked.adjustment)
    facts = {"model": f"checkpoint {checkpoint.resolve()}"}
    if asked.method is None or model.preprocessing is None:
        return Trained(checkpoint, model, asked.folder or folder_of(checkpoint), facts)
    model = asked.applied(model, run_of(checkpoint.absolute())).requires_grad_(False)
    return Trained(
        checkpoint, model, asked.folder or folder_of(checkpoint), facts | {"decides": type(asked.method).__name__}
    )
