"""Sending pictures and tables to the loggers and to the disk, and the figures of neural collapse."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

import etflight
from etflight.callbacks.collapse import NeuralCollapseMonitor
from etflight.runs.folder import FIGURES, run_folder
from etflight.runs.loggers import may_fall_silent
from etflight.utils.errors import UserError
from etflight.utils.files import write_csv
from etflight.utils.trainer import callbacks_of, data_module, is_trial_run

if TYPE_CHECKING:  # matplotlib, which `--help` need not wait for
    from matplotlib.figure import Figure

    import etflight.plotting


def publish(trainer: Trainer, key: str, figure: "Figure", path: Path) -> None:
    """Send a figure to every logger that takes images, and write it to a file unless this is a trial run.

    Args:
        trainer: The trainer whose loggers and step are used.
        key: The name in the loggers, such as `nc/curves`.
        figure: The figure.
        path: The file.
    """
    picture = etflight.plotting.render(figure)
    if not is_trial_run(trainer):
        etflight.plotting.save(picture, path)
    for logger in trainer.loggers:
        with may_fall_silent(logger):
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(key, np.asarray(picture), trainer.global_step, dataformats="HWC")
            elif callable(log_image := getattr(logger, "log_image", None)):
                log_image(key=key, images=[picture], step=trainer.global_step)


def publish_table(
    trainer: Trainer, key: str, header: Sequence[str], rows: Sequence[Sequence[object]], path: Path
) -> None:
    """Send a table to every logger that takes tables, and write it to a CSV file unless this is a trial run.

    Args:
        trainer: The trainer whose loggers and step are used.
        key: The name in the loggers, such as `test/classes`.
        header: A name for each column.
        rows: The rows, with one value for each column.
        path: The file.
    """
    if not is_trial_run(trainer):
        write_csv(path, header, rows)
    for logger in trainer.loggers:
        with may_fall_silent(logger):
            if callable(log_table := getattr(logger, "log_table", None)):
                log_table(key=key, columns=list(header), data=[list(row) for row in rows], step=trainer.global_step)


_SPLITS = ("train", "train_online", "val")  # a picture of one split takes the first of these that was measured


class CollapseFigures(Callback):
    """Draws what each `NeuralCollapseMonitor` of the trainer has measured.

    `nc/curves` shows the measures over epochs, `nc/heat_map` the cosines of class means and class vectors, `nc/variability` the variability
    of each class against its size, `nc/spectrum` the spectrum of the class means, and `nc/triangle` three classes in the plane of their
    vectors. A monitor of another space has its own prefix (`nc_raw/curves`).

    The pictures go to TensorBoard and to every logger with a `log_image(key, images, step)`, such as that of Weights & Biases; the last
    picture of each kind is also written to `<run folder>/figures/nc_curves.png` and so on. The place in the list of callbacks does not
    matter.

    Args:
        every_n_epochs: Draw when a measurement passes a multiple of this number, and at the end of training.
        triangle: Three labels for the triangle and, at the end of training, for its film `figures/nc_triangle.gif`; needs a monitor with
            `snapshots`.

    Raises:
        UserError: An option is invalid, the trainer has no monitor, or the triangle is asked for without snapshots.

    Example:
        >>> from etflight.callbacks.figures import CollapseFigures
        >>> callbacks = [NeuralCollapseMonitor(snapshots=50), CollapseFigures(every_n_epochs=20, triangle=(0, 1, 8))]
    """

    def __init__(self, every_n_epochs: int = 10, triangle: Sequence[int] | None = None) -> None:
        super().__init__()
        if every_n_epochs < 1:
            raise UserError(f"CollapseFigures: every_n_epochs is {every_n_epochs!r}: give 1 or more")
        if triangle is not None and (len(set(triangle)) != 3 or len(triangle) != 3 or min(triangle) < 0):
            raise UserError(f"CollapseFigures: triangle is {list(triangle)!r}: give three different labels, from 0")
        self.every_n_epochs = every_n_epochs
        self.triangle = None if triangle is None else tuple(triangle)
        self._monitors: dict[str, NeuralCollapseMonitor] = {}
        self._drawn: dict[str, float] = {}

    # --- when --------------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the monitors, or raise an error that says what is missing."""
        monitors = callbacks_of(trainer, NeuralCollapseMonitor)
        if not monitors:
            raise UserError(
                "CollapseFigures draws what a NeuralCollapseMonitor measures, and the trainer has none: "
                "add NeuralCollapseMonitor to trainer.callbacks, or take CollapseFigures out"
            )
        self._monitors = {}
        for monitor in monitors:
            second = f"{monitor.prefix}_{'online' if monitor.online else 'sweep'}"
            self._monitors[second if monitor.prefix in self._monitors else monitor.prefix] = monitor
        self._drawn = {key: max(m.epochs, default=0.0) for key, m in self._monitors.items()}
        if self.triangle is not None:
            self._check_triangle(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw what has been measured by the end of the last epoch, if it is due."""
        self._draw_what_is_due(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the last measurement, and make the film."""
        for monitor in self._monitors.values():
            monitor.measure_final_weights(trainer, pl_module)  # it may come later in the list
        self._draw_what_is_due(trainer, pl_module, last=True)
        if trainer.is_global_zero and not is_trial_run(trainer):
            for key, monitor in self._monitors.items():
                if files := self._triangle_files(trainer, monitor):
                    path = _folder(trainer) / f"{key}_triangle.gif"
                    names = _of_classes("class_names", trainer, pl_module, monitor)
                    etflight.plotting.triangle_film(files, cast(Sequence[int], self.triangle), path, class_names=names)
                    rank_zero_info(f"film: {path}")

    def _draw_what_is_due(self, trainer: Trainer, pl_module: LightningModule, last: bool = False) -> None:
        for key, monitor in self._monitors.items():
            if not monitor.epochs:
                continue
            epoch = monitor.epochs[-1]
            # the monitor may have started again since the last picture
            before = self._drawn[key] if self._drawn[key] <= epoch else 0.0
            n = self.every_n_epochs
            if (last and epoch != before) or math.floor(epoch / n) > math.floor(before / n):
                self._drawn[key] = epoch
                if trainer.is_global_zero:
                    self._send(trainer, {f"{key}/{k}": f for k, f in self._draw(trainer, pl_module, monitor).items()})

    # --- what --------------------------------------------------------------------------------------------------------------

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, monitor: NeuralCollapseMonitor
    ) -> dict[str, "Figure"]:
        weight, names = monitor.latest_weight, _of_classes("class_names", trainer, pl_module, monitor)
        num_classes = None if weight is None else len(weight)
        figures = {
            "curves": etflight.plotting.collapse_curves(
                monitor.history, monitor.epochs, prefix=monitor.prefix, num_classes=num_classes
            )
        }
        split = next((split for split in _SPLITS if split in monitor.latest), None)
        if split is not None:
            meets = f"{monitor.prefix}/{split}/alignment" in monitor.history
            figures |= etflight.plotting.portrait(
                monitor.latest[split],
                monitor.weight_of[split] if meets else None,
                counts=_of_classes("class_counts", trainer, pl_module, monitor),
                class_names=names,
            )
        if files := self._triangle_files(trainer, monitor):
            with np.load(files[-1], allow_pickle=False) as shot:
                figures["triangle"] = etflight.plotting.triangle(
                    shot["embeddings"],
                    shot["labels"],
                    shot["weight"],
                    cast(Sequence[int], self.triangle),
                    int(shot["epoch"]),
                    class_names=names,
                )
        return figures

    def _triangle_files(self, trainer: Trainer, monitor: NeuralCollapseMonitor) -> list[Path]:
        """The snapshots of this run for the triangle, in the order of epochs; the folder may also hold those of an earlier run."""
        if self.triangle is None or not _has_embeddings(monitor):
            return []
        files = (run_folder(trainer) / "snapshots" / f"epoch_{int(e):03d}.npz" for e in monitor.epochs if e == int(e))
        return [file for file in files if file.is_file()]

    def _send(self, trainer: Trainer, figures: dict[str, "Figure"]) -> None:
        for key, figure in figures.items():
            publish(trainer, key, figure, _folder(trainer) / f"{key.replace('/', '_')}.png")

    def _check_triangle(self, pl_module: LightningModule) -> None:
        assert self.triangle is not None
        monitor = next(filter(_has_embeddings, self._monitors.values()), None)
        if monitor is None:
            raise UserError(
                "CollapseFigures: the triangle needs embeddings: give NeuralCollapseMonitor snapshots, such as snapshots=50"
            )
        head: Any = dict(pl_module.named_modules()).get(monitor.head)
        if head is not None and max(self.triangle) >= len(head.weight):
            raise UserError(
                f"CollapseFigures: triangle is {list(self.triangle)}: give labels from 0 to {len(head.weight) - 1}"
            )


def _folder(trainer: Trainer) -> Path:
    return run_folder(trainer) / FIGURES


def _has_embeddings(monitor: NeuralCollapseMonitor) -> bool:
    return monitor.snapshots > 0 and monitor.space == "embedding"


def _of_classes(name: str, trainer: Trainer, pl_module: LightningModule, monitor: NeuralCollapseMonitor) -> Any:
    """An attribute with one entry per class, of the model or else of the data module; None if neither has it, or all entries are 0."""
    for owner in (pl_module, data_module(trainer)):
        values = getattr(owner, name, None)
        weight = monitor.latest_weight
        if values is not None and weight is not None and len(values) == len(weight) and any(values):
            return values
    return None
