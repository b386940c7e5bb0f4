"""`etflight export …`: a trained model for programs that do not know etflight."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from etflight.callbacks import PostHoc
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import data_as_trained, load_classifier
from etflight.cli.data_option import data_parser, parse
from etflight.cli.decision_option import add_decision, asked_decision
from etflight.cli.parser import OneLineParser, add_imports
from etflight.data.preprocessing import Preprocessing
from etflight.export import graph
from etflight.export.card import model_card
from etflight.export.timm import save_timm
from etflight.runs.folder import RECORD, last_checkpoint, run_of, same_folder, writing_to
from etflight.utils.errors import UserError, brief
from etflight.utils.terminal import as_it_is, console

FORMATS = ("timm", "onnx", "torch-export")


def main(argv: Sequence[str]) -> None:
    """Write a folder with the model and its card, and perhaps send it to the Hugging Face Hub.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    config = parse(parser, argv)
    output = Path(config.output)
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists already and stays as it is: give a new folder")
    asked = asked_decision(config)
    checkpoint, classifier = load_classifier(str(asked.checkpoint), asked.adjustment)
    classifier.eval().requires_grad_(False)
    preprocessing, data = classifier.preprocessing, None
    if config.get("data") is not None:
        data = data_as_trained(parser, config, classifier, str(checkpoint))
        preprocessing = data.preprocessing
    if preprocessing is None:
        raise UserError(
            f"checkpoint {checkpoint} does not say how its images were normalised, since it was trained without a data module of "
            "etflight's: give its data, as in --data FashionMNIST or -c RUN/config.yaml"
        )
    run, at_its_end = _run_of(checkpoint.absolute())
    tested_in = run if at_its_end else None
    if asked.is_another:
        classifier.preprocessing = preprocessing
        classifier = asked.applied(classifier, run, data).requires_grad_(False)
        tested_in = asked.folder
    with _new_folder(output) as folder:
        calibrated = _write(config.format, classifier, preprocessing, folder)
        name = output.absolute().name
        card, problems = model_card(
            name,
            classifier,
            preprocessing,
            calibrated,
            run,
            config.license,
            at_its_end=at_its_end,
            tested_in=tested_in,
            decides=_in_words(asked.method, classifier),
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    out = console()
    for problem in problems:
        out.print(as_it_is(f"not in the model card: {problem}"), soft_wrap=True)
    names = ", ".join(sorted(path.name for path in output.iterdir()))
    out.print(as_it_is(f"{output}: {names}"), soft_wrap=True)
    if config.push_to_hub is not None:
        out.print(as_it_is(f"pushed to {_push(output, config.push_to_hub)}"), soft_wrap=True)


def _write(kinds: Sequence[str], classifier: Classifier, preprocessing: Preprocessing, folder: Path) -> dict[str, bool]:
    """Write each format; return whether the softmax of each is the calibrated probabilities."""
    calibrated = dict.fromkeys(kinds, True)
    if "timm" in kinds:
        calibrated["timm"] = save_timm(classifier, preprocessing, folder)
    if set(kinds) != {"timm"}:
        program, facts = graph.trace(classifier, preprocessing), graph.facts(classifier, preprocessing)
        if "torch-export" in kinds:
            graph.save_torch_export(program, classifier, facts, folder / "model.pt2")
        if "onnx" in kinds:
            graph.save_onnx(program, classifier, facts, folder / "model.onnx")
    return calibrated


def _run_of(checkpoint: Path) -> tuple[Path | None, bool]:
    """The folder of the run that saved a checkpoint, and whether it is the run's last one."""
    run = run_of(checkpoint)
    at_its_end = run is not None and same_folder(checkpoint, last_checkpoint(run))
    return run if at_its_end or (run is not None and (run / RECORD).is_file()) else None, at_its_end


def _in_words(method: PostHoc | None, classifier: Classifier) -> str:
    adjustment = classifier.decision.describe_adjustment()
    if method is not None:
        return f"`{type(method).__name__}` decides in place of the trained head."
    return f"The logits of the trained head decide after {adjustment}." if adjustment else ""


# The folder ---------------------------------------------------------------------------------------------------------


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into. It takes its name when the block ends without an error; otherwise nothing is left of it."""
    partial = output.absolute().with_name(f".{output.absolute().name}.partial{os.getpid()}")
    with writing_to(output, "output"):
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(output)  # fails if another folder with files has appeared meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _push(folder: Path, repository: str) -> str:
    """Upload a folder and return its address."""
    from huggingface_hub import HfApi

    try:
        api = HfApi(library_name="etflight")
        place = api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=place.repo_id, commit_message="Export from etflight")
    except Exception as error:  # errors of the client, its transport and its checks of names
        raise UserError(
            f"{folder} is written, but the Hugging Face Hub cannot be reached, or refuses {repository} ({brief(error)}): "
            f"log in with hf auth login, then try hf upload {repository} {folder}"
        ) from error
    return str(place)


def _parser() -> OneLineParser:
    parser = data_parser(
        "export",
        "Write a trained model for programs that do not know etflight, with a model card.",
        required=False,
    )
    parser.add_argument(
        "run",
        type=str,
        help="Run folder, whose last checkpoint is taken, or a checkpoint; averaged weights (EMA) where it has them.",
    )
    parser.add_argument(
        "--output", type=str, required=True, help="Folder to write, new or empty; its name becomes the model's."
    )
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["timm"],
        help="timm: model.safetensors and config.json for timm.create_model('local-dir:…'); onnx: model.onnx; torch-export: model.pt2.",
    )
    add_decision(parser)
    parser.add_argument(
        "--license",
        type=str | None,
        default=None,
        help="Licence of the weights for the model card, as the Hub calls it: apache-2.0, cc-by-4.0, …",
    )
    parser.add_argument(
        "--push_to_hub",
        type=str | None,
        default=None,
        help="USER/NAME on the Hugging Face Hub to upload the folder to.",
    )
    add_imports(parser)
    return parser
