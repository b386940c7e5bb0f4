"""`etflight ood …`: how well a trained model tells images of unknown classes from those of its own classes."""

import re
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt
from rich.table import Table

from etflight import plotting
from etflight.analysis.ood import ask, separations
from etflight.analysis.outputs import class_vectors
from etflight.cli.checkpoint_option import compare_with_training, data_of_run
from etflight.cli.command import Asked, Results, command, show, show_place
from etflight.cli.data_option import existing
from etflight.cli.decision_option import load_trained
from etflight.metrics.ood import Separation
from etflight.runs.folder import CONFIG, read_record, run_of
from etflight.runs.record import data_facts, test_facts
from etflight.utils.errors import UserError
from etflight.utils.terminal import as_it_is

RECORD, PICTURE = "ood.json", "histograms.png"


@dataclass
class Options:
    """What is compared.

    Attributes:
        adapt: Resize unknown images of another size (bilinearly), and turn grey into RGB or RGB into grey.
        k: The score knn is the distance to the k-th nearest training image. Default: 50, at most the images of the smallest class.
        components: Principal components of the training features for neco. Default: one less than classes.
    """

    adapt: bool = False
    k: PositiveInt | None = None
    components: PositiveInt | None = None


@command(
    "ood",
    "Measure how well a trained model tells images of unknown classes (the test images of --data) from the test images of its run, by "
    "scores that need no further training. Labels of the unknown images are not used, and they are normalised as the run's.",
    Options,
    run="Run folder, or a checkpoint in one; its own images are the known ones.",
    output="Folder for ood.json and the picture. Default: ood/NAME in the run folder, NAME being the unknown set's.",
    data="required",
)
def main(asked: Asked[Options]) -> None:
    """Print a table of scores, and write `ood.json` and histograms."""
    if (run := run_of(existing(asked.run))) is None or not (run / CONFIG).is_file():
        raise UserError(
            f"{asked.run} is not in a run folder, whose config.yaml says which images are known: give one, such as runs/digits/ce"
        )
    checkpoint, model, folder, what = load_trained(asked.run)
    class_vectors(model, f"checkpoint {checkpoint}")  # or an error, if there are none
    try:
        known = data_of_run(run, model.preprocessing, "ood")
        compare_with_training(known, model, checkpoint, images=True)
    except UserError as error:
        raise UserError(
            f"the run's own images, which are the known ones: {error} (their place is that of {run / CONFIG}: try with "
            f"etflight describe -c {run / CONFIG})"
        ) from error
    unknown = asked.data(known.preprocessing)
    device = asked.device()
    question = ask(model, known, unknown, **vars(asked.options))
    facts = {
        **what,
        "k": question.k,
        "components": question.components,
        "unknown": {
            "class": type(unknown).__name__,
            **test_facts(unknown),
            "image_shape": list(unknown.split("test").source.image_shape),
            "crop_pct": unknown.split("test").source.crop_pct,
            "adapted": question.adapted,
            "shared_classes": question.shared_classes,
        },
    }
    seed = read_record(folder).get("seed")
    name = re.sub(r"[^\w.-]+", "_", unknown.dataset_name).strip(".") or type(unknown).__name__
    folder = Path(asked.output or folder / "ood" / name)
    results = Results(folder / RECORD, facts, (PICTURE,))

    others = asked.stored(model, known.with_test_images(question.unknown), ("test",), name)
    known = asked.stored(model, known, ("train", "test"))
    found = separations(question._replace(known=known, unknown=others.split("test")), device, quiet=asked.quiet)
    record = {
        **facts,
        "seed": seed,
        "temperature": found.temperature,
        "known": {**data_facts(known), "train_images": found.train_images, "test_images": found.test_images},
        "scores": {name: result._asdict() for name, result in found.separations.items()},
        "left_out": found.left_out,
        **found.nc5,
    }
    panels = {f"{name}: AUROC {100 * found.separations[name].auroc:.1f} %": both for name, both in found.scores.items()}
    names = f"known: {known.dataset_name}", f"unknown: {unknown.dataset_name}"
    results.write(record, {PICTURE: plotting.score_histograms(panels, *names)})
    settings = f"temperature {found.temperature:.3g} of msp and energy, k = {question.k} of knn"
    if any(name.startswith("neco") for name in found.scores):
        settings += f", {question.components} components of neco"
    nc5 = ", ".join(f"{name} {value:.4g}" for name, value in found.nc5.items())
    show(
        _table(f"{known.dataset_name} (known) and {unknown.dataset_name} (unknown)", found.separations),
        f"checkpoint {checkpoint}: {settings}",
        *(f"{name} is left out: {reason}" for name, reason in found.left_out.items()),
        f"{nc5}: mean |cos| of class means and the mean of the unknown images",
    )
    show_place(folder, f"{RECORD}, {PICTURE}")


def _table(title: str, results: dict[str, Separation]) -> Table:
    table = Table(title=as_it_is(title))
    table.add_column("score", no_wrap=True)
    for column in ("AUROC", "AUPR known", "AUPR unknown", "FPR95"):
        table.add_column(f"{column} %", justify="right", no_wrap=True)
    for name, result in results.items():
        table.add_row(name, *(f"{100 * value:.1f}" for value in result))
    return table
