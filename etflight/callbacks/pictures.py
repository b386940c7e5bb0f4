"""The way of a picture or a table to the loggers and to the disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

import etflight
from etflight.callbacks.trainer import is_trial_run
from etflight.files import write_csv
from etflight.loggers import may_fall_silent

if TYPE_CHECKING:  # matplotlib, which `--help` need not wait for
    from matplotlib.figure import Figure

    import etflight.plotting


def publish(trainer: Trainer, key: str, figure: "Figure", path: Path) -> None:
    """Send a figure to every logger that takes images, and write it to a file unless this is a trial run.

    Args:
        trainer: whose loggers and step.
        key: what loggers call it, such as `nc/curves`.
        figure: what to draw.
        path: of the file.
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
        trainer: whose loggers and step.
        key: what loggers call it, such as `test/classes`.
        header: a name for each column.
        rows: as many values each.
        path: of the file.
    """
    if not is_trial_run(trainer):
        write_csv(path, header, rows)
    for logger in trainer.loggers:
        with may_fall_silent(logger):
            if callable(log_table := getattr(logger, "log_table", None)):
                log_table(key=key, columns=list(header), data=[list(row) for row in rows], step=trainer.global_step)
