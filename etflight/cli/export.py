"""`etflight export …`: a trained model for programs that do not know etflight."""

from dataclasses import dataclass
from pathlib import Path

from etflight.cli.checkpoint_option import compare_with_training, load_classifier
from etflight.cli.command import Asked, command, show
from etflight.cli.decision_option import add_decision, asked_decision
from etflight.cli.parser import OneLineParser
from etflight.export.folder import FORMATS, describe_decision, export, push, refuse_files_in
from etflight.runs.folder import run_of
from etflight.utils.errors import UserError


@dataclass
class Options:
    """The folder.

    Attributes:
        license: Licence of the weights for the model card, as the Hub calls it: apache-2.0, cc-by-4.0, …
        push_to_hub: USER/NAME on the Hugging Face Hub to upload the folder to.
    """

    license: str | None = None
    push_to_hub: str | None = None


def _add_formats_and_decision(parser: OneLineParser) -> None:
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["timm"],
        help="timm: model.safetensors and config.json for timm.create_model('local-dir:…'); onnx: model.onnx; torch-export: model.pt2.",
    )
    add_decision(parser)


@command(
    "export",
    "Write a trained model for programs that do not know etflight, with a model card.",
    Options,
    run="Run folder, whose last checkpoint is taken, or a checkpoint; averaged weights (EMA) where it has them.",
    output="Folder to write, new or empty; its name becomes the model's.",
    output_required=True,
    data="optional",
    accelerator=False,
    more=_add_formats_and_decision,
)
def main(asked: Asked[Options]) -> None:
    """Write a folder with the model and its card, and perhaps send it to the Hugging Face Hub."""
    output = Path(str(asked.output))
    refuse_files_in(output)
    decision = asked_decision(asked.config)
    checkpoint, model = load_classifier(str(decision.checkpoint), decision.adjustment)
    model.eval().requires_grad_(False)
    data = None
    if asked.config.get("data") is not None:
        data = compare_with_training(asked.data(model.preprocessing), model, checkpoint)
    preprocessing = data.preprocessing if data is not None else model.preprocessing
    if preprocessing is None:
        raise UserError(
            f"checkpoint {checkpoint} does not say how its images were normalised, since it was trained without a data module of "
            "etflight's: give its data, as in --data FashionMNIST or -c RUN/config.yaml"
        )
    decides = None
    if decision.is_another:
        model.preprocessing = preprocessing
        model = decision.applied(model, run_of(checkpoint.absolute()), data).requires_grad_(False)
        decides = describe_decision(model)
        if decision.method is not None:
            decides = f"`{type(decision.method).__name__}` decides in place of the trained head."
    problems = export(
        model,
        output,
        asked.config.format,
        preprocessing=preprocessing,
        checkpoint=checkpoint,
        decides=decides,
        tested_in=decision.folder,
        licence=asked.options.license,
    )
    show(
        *(f"not in the model card: {problem}" for problem in problems),
        f"{output}: {', '.join(sorted(path.name for path in output.iterdir()))}",
    )
    if asked.options.push_to_hub is not None:
        show(f"pushed to {push(output, asked.options.push_to_hub)}")
