"""A folder with a trained classifier in several formats and its model card, and its upload to the Hugging Face Hub."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, get_args

from etflight.classifier import Classifier
from etflight.data.preprocessing import Preprocessing
from etflight.export import graph
from etflight.export.card import model_card
from etflight.export.timm import save_timm
from etflight.runs.folder import RECORD, last_checkpoint, run_of, same_folder, writing_to
from etflight.utils.errors import UserError, argument, brief

Format = Literal["timm", "onnx", "torch-export"]
FORMATS: tuple[Format, ...] = get_args(Format)


def export(
    classifier: Classifier,
    output: str | Path,
    format: Sequence[Format] = ("timm",),
    *,
    preprocessing: Preprocessing | None = None,
    checkpoint: Path | None = None,
    decides: str | None = None,
    tested_in: Path | None = None,
    licence: str | None = None,
) -> list[str]:
    """Write a new folder with a trained classifier and its model card; if anything fails, nothing is left of it.

    Args:
        classifier: The classifier, on the CPU, in evaluation mode and without gradients.
        output: The folder, new or empty; its name becomes the model's.
        format: What to write: "timm" for `model.safetensors` and `config.json`, "onnx" for `model.onnx`, "torch-export" for `model.pt2`.
        preprocessing: The preprocessing of its images; None: that of the classifier.
        checkpoint: The file of the classifier, whose run the card tells; None: no run.
        decides: If it decides otherwise than its checkpoint, by what, in a sentence for the card, which then tells no results of the
            checkpoint's run; None if it does not.
        tested_in: The run folder with the results of such a decision, or None.
        licence: The licence of the weights, by its name on the Hub, or None.

    Returns:
        Problems with files of the run that the card had to leave out.

    Raises:
        UserError: The folder has files, a format cannot hold this model, or the preprocessing is not known.
    """
    output = Path(output)
    refuse_files_in(output)
    preprocessing = preprocessing or classifier.preprocessing
    if preprocessing is None:
        raise UserError("the classifier does not know how its images are normalised: give preprocessing")
    run, at_its_end = (None, False) if checkpoint is None else _run_of(checkpoint.absolute())
    if decides is None:
        tested_in = run if at_its_end else None
    with _new_folder(output) as folder:
        card, problems = model_card(
            output.absolute().name,
            classifier,
            preprocessing,
            _write(format, classifier, preprocessing, folder),
            run,
            licence,
            at_its_end=at_its_end,
            tested_in=tested_in,
            decides=describe_decision(classifier) if decides is None else decides,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
    return problems


def describe_decision(classifier: Classifier) -> str:
    """What decides in place of the trained head's logits, in a sentence; empty for these."""
    adjustment = classifier.decision.describe_adjustment()
    return f"The logits of the trained head decide after {adjustment}." if adjustment else ""


def refuse_files_in(output: Path) -> None:
    """Refuse a folder that is not new or empty.

    Raises:
        UserError: It has files, or is a file.
    """
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{argument('output', str(output))} exists already and stays as it is: give a new folder")


def _write(
    formats: Sequence[str], classifier: Classifier, preprocessing: Preprocessing, folder: Path
) -> dict[str, bool]:
    """Write each format; return whether the softmax of each is the calibrated probabilities."""
    calibrated = dict.fromkeys(formats, True)
    if "timm" in formats:
        calibrated["timm"] = save_timm(classifier, preprocessing, folder)
    if set(formats) != {"timm"}:
        program, facts = graph.trace(classifier, preprocessing), graph.facts(classifier, preprocessing)
        if "torch-export" in formats:
            graph.save_torch_export(program, classifier, facts, folder / "model.pt2")
        if "onnx" in formats:
            graph.save_onnx(program, classifier, facts, folder / "model.onnx")
    return calibrated


def _run_of(checkpoint: Path) -> tuple[Path | None, bool]:
    """The folder of the run that saved a checkpoint, and whether it is the run's last one."""
    run = run_of(checkpoint)
    at_its_end = run is not None and same_folder(checkpoint, last_checkpoint(run))
    return run if at_its_end or (run is not None and (run / RECORD).is_file()) else None, at_its_end


@contextmanager
def _new_folder(output: Path) -> Iterator[Path]:
    """A folder to write into. It takes its name when the block ends without an error; otherwise nothing is left of it."""
    partial = output.absolute().with_name(f".{output.absolute().name}.partial{os.getpid()}")
    with writing_to(output, argument("output")):
        partial.mkdir(parents=True)
        try:
            yield partial
            partial.rename(output)  # fails if another folder with files has appeared meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the Hugging Face Hub and return its address.

    Raises:
        UserError: The Hub cannot be reached, or refuses it.
    """
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
