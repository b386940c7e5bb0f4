"""Which decision a command takes: that of the checkpoint, of a run that tested it in another way, or of the command line."""

from pathlib import Path
from typing import Any, NamedTuple

from jsonargparse import ArgumentParser, Namespace

from etflight.callbacks import PostHoc
from etflight.checkpoint.specs import from_spec, to_spec
from etflight.decision import Adjustment
from etflight.runs.folder import last_checkpoint, read_record
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
    run = Path(config.run)
    given = {name: value for name in _ADJUSTMENT if (value := config.model[name]) is not None}
    method = (
        None
        if config.post_hoc is None
        else from_spec(to_spec(config.post_hoc.as_dict(), "post_hoc"), PostHoc, "post_hoc")()
    )
    tested = read_record(run).get("checkpoint") if run.is_dir() and not last_checkpoint(run).is_file() else None
    if not isinstance(tested, str):
        return AskedDecision(run, None, given, method)
    content: Any = read_yaml(run / "config.yaml")
    model, spec = (content.get(key) if isinstance(content, dict) else None for key in ("model", "post_hoc"))
    if not isinstance(model, dict) or not Path(tested).is_file():
        raise UserError(
            f"{run} tested {tested}, which is gone, or its config.yaml is not whole: give the run of the model"
        )
    folder = None if given or method else run
    if method is None and spec is not None:
        method = from_spec(to_spec(spec, "post_hoc"), PostHoc, f"{run / 'config.yaml'}: post_hoc")()
    return AskedDecision(
        Path(tested), folder, {name: model[name] for name in _ADJUSTMENT if name in model} | given, method
    )
