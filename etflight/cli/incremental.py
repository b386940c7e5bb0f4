"""`etflight incremental …`: few-shot class-incremental learning, from the trained model of a base session on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric
from rich.table import Table

from etflight import plotting
from etflight.analysis.incremental import (
    all_classes,
    last_state,
    run_sessions,
    save_state,
    session_features,
    summary,
)
from etflight.analysis.learners import LEARNING_RATES, Method, new_learner
from etflight.cli.checkpoint_option import compare_with_training, folder_of, load_classifier
from etflight.cli.command import Asked, Results, command, show, show_place
from etflight.cli.unsupported import refuse_missing_hardware
from etflight.data import ClassSubset, ImageDataModule
from etflight.data.sessions import few_shot_sessions
from etflight.runs.folder import writing_to
from etflight.runs.record import data_facts

RECORD, FIGURE = "incremental.json", "sessions.png"


@dataclass
class Options:
    """The sessions.

    Attributes:
        way: New classes in each session.
        shots: Training images of each new class.
        method: frame: train the projection towards the reserved vectors of the frame (NC-FSCIL); cosine: a learnable vector for each class;
            ncm: nearest class mean, without training.
        seed: Chooses the shots.
        steps: Steps of SGD in each session.
        lr: Learning rate at first. Default: 2.5 for frame, 0.1 for cosine.
        devices: Processes, which share the images of the backbone.
    """

    way: int
    shots: int
    method: Method = "frame"
    seed: int = 0
    steps: PositiveInt = 200
    lr: float | None = None
    devices: PositiveInt = 1


@command(
    "incremental",
    "Learn new classes from a few images each, session by session, on a frozen backbone.",
    Options,
    run="Run folder or checkpoint of the base session, whose data are a ClassSubset.",
    output="Folder for the results. Default: incremental/METHOD_Nway_Kshot_seedS in the run folder.",
)
def main(asked: Asked[Options]) -> None:
    """Learn the classes that the base session has left, print a table, and write states, `incremental.json` and a figure."""
    options = asked.options
    checkpoint, model = load_classifier(asked.run)
    base = compare_with_training(asked.data(model.preprocessing), model, checkpoint, images=True)
    every = all_classes(base)
    sessions = few_shot_sessions(
        every.split("train").labels.numpy(),
        every.num_classes,
        base=base.num_classes,
        way=options.way,
        shots=options.shots,
        seed=options.seed,
        class_names=every.class_names,
    )
    learner = new_learner(model, every.num_classes, options.method, steps=options.steps, lr=options.lr)
    name = f"{options.method}_{options.way}way_{options.shots}shot_seed{options.seed}"
    folder = Path(asked.output or folder_of(checkpoint) / "incremental" / name)
    settings = _settings(options, base, every, checkpoint)
    results = Results(folder / RECORD, {"settings": settings}, (FIGURE,))
    refuse_missing_hardware(asked.accelerator, "--accelerator")
    fabric = Fabric(accelerator=asked.accelerator, devices=options.devices)
    fabric.launch()
    before = fabric.broadcast(last_state(folder, settings) if fabric.is_global_zero else None)
    rows = [] if before is None else before.results
    if len(rows) < len(sessions):
        features = session_features(model, base, every, sessions, learner, fabric.device, folder=asked.features)
        for done in run_sessions(learner, features, before):
            rows = done.results
            if fabric.is_global_zero:
                with writing_to(folder, "output"):
                    save_state(folder, settings, done)
    if fabric.is_global_zero:
        seen = [session.seen for session in sessions]
        told = [
            {
                **row,
                "classes": own.seen,
                "new_classes": [every.class_names[k] for k in own.new],
                "shots": own.shots.tolist(),
            }
            for own, row in zip(sessions, rows, strict=True)
        ]
        record = {"checkpoint": str(checkpoint), "data": data_facts(base), "settings": settings, **summary(rows)}
        results.write({**record, "sessions": told}, {FIGURE: plotting.session_curves(rows, seen)})
        show(f"{options.way}-way {options.shots}-shot sessions after {checkpoint}", *_tables(record, told))
        show_place(folder, f"{RECORD}, {FIGURE} and a state for each session")
    fabric.barrier()


def _settings(options: Options, base: ImageDataModule, every: ClassSubset, checkpoint: Path) -> dict[str, Any]:
    """All that the numbers depend on, by the name of its option or part."""
    trains = options.method in LEARNING_RATES
    return {
        "method": options.method,
        "way": options.way,
        "shots": options.shots,
        "seed": options.seed,
        "steps": options.steps if trains else None,
        "lr": options.lr if options.lr is not None else LEARNING_RATES.get(options.method),
        "classes": [*every.labels],
        "images": base.fingerprint,
        "test_images": every.split("test").source.content,
        "folder": every.split("test").source.folder,
        "preprocessing": json.loads(json.dumps(base.preprocessing._asdict())),  # as it will be read again
        "checkpoint": hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12],
    }


def _tables(record: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> tuple[Table, str]:
    table = Table(title=f"Method {record['settings']['method']}, accuracy in %")
    for title in ("session", "classes", "all", "base", "new", "forgetting"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [row[name] for name in ("acc", "acc_base", "acc_new", "forgetting")]
        cells = ("–" if value is None else f"{100 * value:.1f}" for value in values)
        table.add_row(str(row["session"]), str(row["classes"]), *cells)
    drop, average = (100 * record[name] for name in ("performance_drop", "average_acc"))
    return table, f"performance drop {drop:.1f}, average accuracy {average:.1f}"
