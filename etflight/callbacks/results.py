"""The results of a test: tables in the terminal, test_metrics.json, per_class.csv, and pictures."""

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

import etflight
from etflight.callbacks.figures import publish, publish_table
from etflight.classifier import PRIOR_SHIFTS, Classifier
from etflight.metrics.accuracy import FEW_BELOW, MANY_ABOVE, has_imbalance, shot_groups, third_groups
from etflight.metrics.evaluation import Evaluation
from etflight.runs.folder import FIGURES, METRICS, PER_CLASS, RESULTS, run_folder, writing_to
from etflight.utils.errors import UserError, argument
from etflight.utils.files import write_json
from etflight.utils.fingerprints import content_of
from etflight.utils.terminal import console
from etflight.utils.trainer import data_module, is_trial_run

if TYPE_CHECKING:  # matplotlib, which `--help` need not wait for
    from matplotlib.figure import Figure

    import etflight.plotting


class TestResults(Callback):
    """Prints a test of a `Classifier` group by group; writes `test_metrics.json`, `per_class.csv` and pictures into the run folder.

    The pictures are `test/reliability`, `test/confusion` (up to 1000 classes) and `test/per_class`, in every logger that takes images
    and in `figures/reliability.png` and so on; `per_class.csv` is the table `test/classes` of W&B.

    Args:
        verbose: Whether to print tables.
    """

    __test__ = False  # not a test case, whatever its name suggests to a test runner

    def __init__(self, verbose: bool = True) -> None:
        self.verbose = verbose

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep results of another set, or of images that are prepared otherwise, out of the folder of a training.

        Raises:
            UserError: The folder is that of a training, and the set is another, or there are results and images are prepared otherwise.
        """
        folder, data, model = run_folder(trainer), data_module(trainer), cast(Classifier, pl_module)
        if not (folder / METRICS).is_file() or is_trial_run(trainer):
            return
        mend = f"give the images as in training, or {argument('name')}"
        known, own = content_of(model.fingerprint), _content(data)
        if known and own and known != own:
            raise UserError(
                f"{data} is not the set that {folder} was trained on, so its results do not go there: {mend}"
            )
        if (folder / RESULTS).is_file() and (differences := model.differences(data)):
            raise UserError(f"{differences[0]}; the results in {folder} stay as they are: {mend}")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print on the first process; all processes take part in adding up the counts."""
        model = cast(Classifier, pl_module)
        evaluation = model.evaluation()
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        folder = run_folder(trainer)
        with writing_to(folder):
            if not is_trial_run(trainer):
                write_json(folder / RESULTS, metrics)
            rows = _rows(model, evaluation)
            publish_table(trainer, "test/classes", _HEADER, rows, folder / PER_CLASS)
            for name, figure in _figures(model, evaluation).items():
                publish(trainer, f"test/{name}", figure, folder / FIGURES / f"{name}.png")
        if self.verbose:  # last, since a reader of the output may leave
            out = console()
            for table in _tables(metrics, model, evaluation):
                out.print(table)
        if not is_trial_run(trainer):
            rank_zero_info(f"results: {folder / RESULTS}, {PER_CLASS} and {FIGURES}/")


def _content(data: Any) -> str | None:
    """What identifies the set; None if it is unknown."""
    try:
        return content_of(getattr(data, "fingerprint", None))
    except UserError:  # training images may be missing, since a test does not need them
        return None


# Class by class -----------------------------------------------------------------------------------------------------

_HEADER = ["class", "name", "train_images", "acc", "precision", "test_images", "shots", "third"]


def _rows(model: Classifier, evaluation: Evaluation) -> list[tuple[object, ...]]:
    samples, accuracy, precision = (column.tolist() for column in evaluation.classes)
    counts = model.class_counts
    nobody = [""] * len(counts)
    shots = _names(shot_groups(counts)) if counts.any() else nobody
    thirds = _names(third_groups(counts)) if has_imbalance(counts) else nobody
    labels = range(len(counts))
    return list(
        zip(labels, model.names_or_labels, counts.tolist(), accuracy, precision, samples, shots, thirds, strict=True)
    )


def _names(groups: Mapping[str, torch.Tensor]) -> list[str]:
    """The group that each class is in."""
    chosen = torch.stack(list(groups.values())).int().argmax(0).tolist()
    return [list(groups)[i] for i in chosen]


# Pictures -----------------------------------------------------------------------------------------------------------


def _figures(model: Classifier, evaluation: Evaluation) -> "dict[str, Figure]":
    panels = {"raw": evaluation.raw}
    if float(model.temperature) != 1:
        panels[f"temperature {float(model.temperature):.3g}"] = evaluation.calibrated
    figures = {"reliability": etflight.plotting.reliability_diagram(panels)}
    if evaluation.confusion is not None:
        figures["confusion"] = etflight.plotting.confusion_matrix(evaluation.confusion, model.class_names)
    if bool(model.class_counts.any()):
        accuracy = evaluation.classes.accuracy
        figures["per_class"] = etflight.plotting.accuracy_by_size(accuracy, model.class_counts, model.class_names)
    return figures


# Tables -------------------------------------------------------------------------------------------------------------


def _tables(metrics: Mapping[str, float], model: Classifier, evaluation: Evaluation) -> Iterator[Group]:
    """Make a table for each group of measures, no wider than 80 columns."""
    images, classes = int(evaluation.classes.samples.sum()), len(model.class_counts)
    tau = model.hparams["logit_adjustment"]
    adjusted = f", {model.hparams['adjustment']} logit adjustment {tau:g}" if tau else ""
    columns = {"acc": "accuracy", "acc_macro": "balanced", "acc_harmonic": "harmonic mean", "acc_worst": "worst class"}
    yield _row(f"Test: {images} images of {classes} classes, in per cent{adjusted}", metrics, columns)
    if bool(model.class_counts.any()):
        limits = f"many > {MANY_ABOVE}, medium {FEW_BELOW}-{MANY_ABOVE}, few < {FEW_BELOW}"
        title = f"By training images: {limits} (number of classes)"
        yield _row(title, metrics, _sizes(shot_groups(model.class_counts)))
    if has_imbalance(model.class_counts):
        title = "By thirds of the classes, most training images first"
        yield _row(title, metrics, _sizes(third_groups(model.class_counts)))
    yield _row(f"Calibration, {model.describe_temperature()}", metrics, {"ece": "raw ECE", "ece_calibrated": "ECE"})
    if has_imbalance(model.class_counts):
        table = Table("ratio of the test images", box=SIMPLE_HEAD)
        for ratio in PRIOR_SHIFTS:
            table.add_column(str(ratio), justify="right", min_width=6)
        for way, meaning in (("forward", "as in training"), ("backward", "against it")):
            cells = [_per_cent(metrics.get(f"test/acc_{way}_{ratio}")) for ratio in PRIOR_SHIFTS]
            table.add_row(f"{way}, {meaning}", *cells)
        yield _titled("If test images were long-tailed, too", table)


def _sizes(groups: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The headings of groups, with the number of classes in each, by the names of their accuracies."""
    return {f"acc_{name}": f"{name} ({int(members.sum())})" for name, members in groups.items()}


def _row(title: str, metrics: Mapping[str, float], columns: Mapping[str, str]) -> Group:
    table = Table(box=SIMPLE_HEAD)
    for heading in columns.values():
        table.add_column(heading, justify="right", min_width=11)
    table.add_row(*[_per_cent(metrics.get(f"test/{name}")) for name in columns])
    return _titled(title, table)


def _titled(title: str, table: Table) -> Group:
    return Group(Text(title, "bold"), table)


def _per_cent(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{100 * value:.2f}"
