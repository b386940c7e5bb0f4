"""The callbacks of a training or an evaluation, in their order."""

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging

from etflight.callbacks.averaging import StochasticWeightAverage
from etflight.callbacks.balance import DoubleCorrection
from etflight.callbacks.checkpoint import LastCheckpoint, StepSeed
from etflight.callbacks.collapse import NeuralCollapseMonitor
from etflight.callbacks.fine_tuning import FineTuning
from etflight.callbacks.predictions import PredictionTable
from etflight.callbacks.progress import Progress, Speed, StepNotice
from etflight.callbacks.results import TestResults
from etflight.callbacks.stop_signals import StopSignals
from etflight.callbacks.temperature import FitTemperature


def default_callbacks(
    own: Sequence[Callback] = (),
    *,
    stage: Literal["fit", "validate", "test", "predict"] = "fit",
    checkpoint: LastCheckpoint | bool = True,
    monitor: NeuralCollapseMonitor | bool = True,
    fine_tuning: FineTuning | None = None,
    post_hoc: Callback | None = None,
    verbose: bool = True,
    predictions: PredictionTable | None = None,
) -> list[Callback]:
    """The callbacks that `etflight fit`, `validate`, `test` and `predict` give to the trainer of a `Classifier`, in their order.

    A training saves `checkpoints/last.ckpt`, goes on bit by bit from there, ends well on SIGTERM, measures neural collapse, prints a line
    for each epoch and reports its speed. An evaluation fits a temperature that is missing, and writes and prints the results of a test.
    Those of a training serve the same trainer's evaluations too.

    Args:
        own: Your own callbacks. A `StochasticWeightAveraging` of Lightning becomes a `StochasticWeightAverage`.
        stage: What the trainer does.
        checkpoint: What saves `last.ckpt` in a training; False saves nothing.
        monitor: What measures neural collapse in a training; True is `NeuralCollapseMonitor(every_n_epochs="auto")`, and False measures
            nothing. A monitor in `own` takes its place.
        fine_tuning: What a training starts from, and what it freezes.
        post_hoc: What decides in an evaluation in place of the trained head.
        verbose: Whether a test prints tables.
        predictions: What writes the table of a prediction.

    Returns:
        The list for `Trainer(callbacks=…)`. Give the trainer `enable_checkpointing=False` too, unless it should keep checkpoints of
        Lightning's own.
    """
    fits = stage == "fit"
    last = (LastCheckpoint() if checkpoint is True else checkpoint or None) if fits else None
    # a signal is answered, and a checkpoint saved, before anything of the next step or epoch has happened; only what makes the final
    # weights comes earlier, so that these are saved
    averages = [StochasticWeightAverage.of(one) for one in own if isinstance(one, StochasticWeightAveraging)]
    callbacks: list[Callback | None] = [StopSignals(last), *averages, last]
    if fits:
        # the step is seeded before any other callback draws numbers in it
        callbacks += [StepSeed(), Progress(), fine_tuning]
        if monitor and not any(isinstance(one, NeuralCollapseMonitor) for one in own):
            callbacks.append(NeuralCollapseMonitor(every_n_epochs="auto") if monitor is True else monitor)
    # it replaces the head, for which a temperature is fitted further down
    callbacks.append(post_hoc)
    callbacks += [one for one in own if not isinstance(one, StochasticWeightAveraging)]
    # they look at what the user's callbacks have set up
    callbacks += [StepNotice(), DoubleCorrection(), FitTemperature(), TestResults(verbose), predictions]
    # an epoch is over when all others have done with it
    callbacks.append(Speed() if fits else None)
    return [callback for callback in callbacks if callback is not None]
