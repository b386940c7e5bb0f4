"""`etflight incremental …`: few-shot class-incremental learning, from the trained model of a base session on."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric import Fabric
from rich.table import Table
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from etflight import plotting
from etflight.analysis.incremental import Features, Progress, run_sessions, summary
from etflight.analysis.learners import (
    CosineLearner,
    FrameLearner,
    Learner,
    Method,
    NearestMeanLearner,
    Training,
    class_means,
)
from etflight.analysis.outputs import outputs
from etflight.classifier import Classifier
from etflight.cli.checkpoint_option import (
    class_vectors,
    data_as_trained,
    folder_of,
    load_classifier,
)
from etflight.cli.data_option import data_parser, parse_over_run
from etflight.cli.parser import OneLineParser, add_imports
from etflight.cli.unsupported import refuse_missing_hardware
from etflight.data import ClassSubset, ImageDataModule
from etflight.data.sessions import Session, few_shot_sessions
from etflight.runs.folder import check_writable, refuse_other_results, writing_to
from etflight.runs.record import data_facts
from etflight.utils.errors import UserError, brief
from etflight.utils.files import replacing, write_json
from etflight.utils.terminal import as_it_is, console

RECORD, FIGURE = "incremental.json", "sessions.png"
_LEARNING_RATES = {"frame": 2.5, "cosine": 0.1}  # of the methods that train
_METADATA = "etflight"  # the entry of a state file that holds what are not tensors


class _Base(NamedTuple):
    """The base session.

    Attributes:
        classifier: Its model.
        checkpoint: The file of the model.
        data: Its classes and images.
        all: All classes of the set, in the order in which they come.
    """

    classifier: Classifier
    checkpoint: Path
    data: ClassSubset
    all: ClassSubset


def main(argv: Sequence[str]) -> None:
    """Learn the classes that the base session has left, print a table, and write states, `incremental.json` and a figure.

    Args:
        argv: The command's arguments.

    Raises:
        UserError: What the user gave cannot work.
        SystemExit: With status 2 for a usage error, 0 after help.
    """
    parser = _parser()
    config = parse_over_run(parser, argv)
    _check(config)
    base = _base(parser, config)
    sessions = few_shot_sessions(
        base.all.split("train").labels.numpy(),
        base.all.num_classes,
        base=base.data.num_classes,
        way=config.way,
        shots=config.shots,
        seed=config.seed,
        class_names=base.all.class_names,
    )
    learner = _learner(config, base)
    folder = Path(config.output) if config.output else _default_folder(base.checkpoint, config)
    check_writable(folder, "--output")
    settings = _settings(config, base)
    refuse_other_results(folder / RECORD, {"settings": settings}, (FIGURE,))
    refuse_missing_hardware(config.accelerator, "--accelerator")
    fabric = Fabric(accelerator=config.accelerator, devices=config.devices)
    fabric.launch()
    before: Progress | None = fabric.broadcast(_last_state(folder, settings) if fabric.is_global_zero else None)
    results = [] if before is None else before.results
    if len(results) < len(sessions):
        for done in run_sessions(learner, _features(base, sessions, learner, fabric.device), before):
            results = done.results
            if fabric.is_global_zero:
                with writing_to(folder, "--output"):
                    _save_state(_state_file(folder, len(results) - 1), settings, done)
    if fabric.is_global_zero:
        _report(folder, settings, base, sessions, results)
    fabric.barrier()


# The base session ---------------------------------------------------------------------------------------------------


def _base(parser: OneLineParser, config: Namespace) -> _Base:
    checkpoint, classifier = load_classifier(config.run)
    data: ImageDataModule = data_as_trained(parser, config, classifier, str(checkpoint), images=True)
    if not isinstance(data, ClassSubset):
        raise UserError(
            f"{config.run} was trained on all classes of {data}, so none is left to come: train it on some "
            f"(--data ClassSubset --data.images {type(data).__name__} --data.classes 0-{max(data.num_classes // 2, 2) - 1})"
        )
    later = sorted({*range(data.images.num_classes)} - {*data.labels})
    loading = {name: getattr(data, name) for name in ("mean", "std", "batch_size", "eval_batch_size", "num_workers")}
    every = ClassSubset(images=data.images, classes=",".join(map(str, [*data.labels, *later])), **loading)
    return _Base(classifier, checkpoint, data, every)


def _learner(config: Namespace, base: _Base) -> Learner:
    head = base.classifier.head
    if config.method == "ncm":
        return NearestMeanLearner(head)
    training = Training(config.steps, config.lr)
    if config.method == "cosine":
        class_vectors(base.classifier, base.checkpoint)  # or an error, if there are none
        return CosineLearner(head, training)
    return FrameLearner(head, base.classifier.loss, training, base.all.num_classes)


def _features(base: _Base, sessions: Sequence[Session], learner: Learner, device: torch.device) -> Features:
    """Run the backbone over all images once; processes share the images of the base session and of the test."""
    model = base.classifier
    trained_on = outputs(model, base.data, "train", device)
    _refuse_empty_classes("training", trained_on.labels, base.data)
    learner.begin(trained_on.embedding, trained_on.labels)
    tested_on = outputs(model, base.all, "test", device)
    _refuse_empty_classes("test", tested_on.labels, base.all)
    return Features(
        class_means(trained_on.features, trained_on.labels),
        [_shots(model.eval(), base.all, session, device) for session in sessions[1:]],
        (tested_on.features, tested_on.labels),
    )


def _refuse_empty_classes(kind: str, labels: Tensor, data: ClassSubset) -> None:
    counts = labels.bincount(minlength=data.num_classes).tolist()
    if 0 in counts:
        name = data.class_names[counts.index(0)]
        raise UserError(f"{data}: class {name} has no {kind} image that can be read: add some, or leave the class out")


@torch.no_grad()
def _shots(model: Classifier, data: ClassSubset, session: Session, device: torch.device) -> tuple[Tensor, Tensor]:
    """The features and classes of a session's shots, not augmented."""
    split, positions = data.split("train"), session.shots.tolist()
    features, labels = [], []
    for first in range(0, len(positions), data.batch_size):
        images, classes = split.__getitems__(positions[first : first + data.batch_size])
        images, classes = data.eval_transform((images.to(device), classes))
        features.append(model.features(images).float().cpu())
        labels.append(classes)
    split.end_pass()
    classes = torch.cat(labels)
    if len(classes) < len(positions):
        raise UserError(f"{data}: an image that was chosen as a shot cannot be read: mend it, or give another --seed")
    return torch.cat(features), classes


# States -------------------------------------------------------------------------------------------------------------


def _settings(config: Namespace, base: _Base) -> dict[str, Any]:
    """All that the numbers depend on, by the name of its option or part."""
    trains = config.method != "ncm"
    return {
        "method": config.method,
        "way": config.way,
        "shots": config.shots,
        "seed": config.seed,
        "steps": config.steps if trains else None,
        "lr": config.lr if trains else None,
        "classes": [*base.all.labels],
        "images": base.data.fingerprint,
        "test_images": base.all.split("test").source.content,
        "folder": base.all.split("test").source.folder,
        "preprocessing": json.loads(json.dumps(base.data.preprocessing._asdict())),  # as it will be read again
        "checkpoint": hashlib.sha256(base.checkpoint.read_bytes()).hexdigest()[:12],
    }


def _state_file(folder: Path, session: int) -> Path:
    return folder / f"session_{session}.safetensors"


def _save_state(path: Path, settings: dict[str, Any], done: Progress) -> None:
    tensors = {"memory": done.memory, **{f"learnt.{name}": value for name, value in done.learnt.items()}}
    metadata = json.dumps({"settings": settings, "results": done.results})
    with replacing(path) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {_METADATA: metadata})


def _last_state(folder: Path, settings: dict[str, Any]) -> Progress | None:
    """The state after the last finished session, or None.

    Raises:
        UserError: The folder's sessions have other settings, or a state cannot be read.
    """
    finished = 0
    while _state_file(folder, finished).is_file():
        finished += 1
    if not finished:
        return None
    path = _state_file(folder, finished - 1)
    known, done = _read_state(path)
    for name, value in settings.items():
        if known.get(name) != value:
            saved, now = (shorten(str(content), 80, placeholder=" …") for content in (known.get(name), value))
            raise UserError(
                f"{folder} holds sessions with other settings ({name}: {saved}, not {now}), which stay as they are: "
                "give --output for another folder"
            )
    return done


def _read_state(path: Path) -> tuple[dict[str, Any], Progress]:
    try:
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        settings, results = content["settings"], content["results"]
        learnt = {name.removeprefix("learnt."): value for name, value in tensors.items() if name != "memory"}
        return settings, Progress(learnt, tensors["memory"], results)
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): mend its permissions") from error
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no state of a session, or is damaged ({brief(error)}): remove it") from error


# Results ------------------------------------------------------------------------------------------------------------


def _report(
    folder: Path, settings: dict[str, Any], base: _Base, sessions: Sequence[Session], results: Sequence[dict[str, Any]]
) -> None:
    """Print the table, and write `incremental.json` and the figure."""
    names, sums, out = base.all.class_names, summary(results), console()
    rows = [
        {
            **row,
            "classes": session.seen,
            "new_classes": [names[k] for k in session.new],
            "shots": session.shots.tolist(),
        }
        for session, row in zip(sessions, results, strict=True)
    ]
    with writing_to(folder, "--output"):
        record = {"checkpoint": str(base.checkpoint), "data": data_facts(base.data), "settings": settings}
        write_json(folder / RECORD, {**record, **sums, "sessions": rows})
        figure = plotting.session_curves(results, [session.seen for session in sessions])
        plotting.save(figure, folder / FIGURE)
    method, way, shots = settings["method"], settings["way"], settings["shots"]
    out.print(as_it_is(f"{way}-way {shots}-shot sessions after {base.checkpoint}"), soft_wrap=True)
    table = Table(title=f"Method {method}, accuracy in %")
    for title in ("session", "classes", "all", "base", "new", "forgetting"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        values = [row[name] for name in ("acc", "acc_base", "acc_new", "forgetting")]
        table.add_row(
            str(row["session"]), str(row["classes"]), *("–" if v is None else f"{100 * v:.1f}" for v in values)
        )
    out.print(table)
    out.print(
        f"performance drop {100 * sums['performance_drop']:.1f}, average accuracy {100 * sums['average_acc']:.1f}"
    )
    out.print(as_it_is(f"{folder}: {RECORD}, {FIGURE} and a state for each session"), style="dim", soft_wrap=True)


# The command line ---------------------------------------------------------------------------------------------------


def _default_folder(checkpoint: Path, config: Namespace) -> Path:
    name = f"{config.method}_{config.way}way_{config.shots}shot_seed{config.seed}"
    return folder_of(checkpoint) / "incremental" / name


def _check(config: Namespace) -> None:
    if config.lr is None:
        config.lr = _LEARNING_RATES.get(config.method)
    elif config.method == "ncm":
        raise UserError("--lr: method ncm trains nothing: leave it out")
    elif not 0 < config.lr < math.inf:
        raise UserError(f"--lr is {config.lr}: give a positive, finite number")


def _parser() -> OneLineParser:
    parser = data_parser(
        "incremental", "Learn new classes from a few images each, session by session, on a frozen backbone."
    )
    parser.add_argument(
        "run", type=str, help="Run folder or checkpoint of the base session, whose data are a ClassSubset."
    )
    parser.add_argument("--way", type=int, required=True, help="New classes in each session.")
    parser.add_argument("--shots", type=int, required=True, help="Training images of each new class.")
    parser.add_argument(
        "--method",
        type=Method,
        default="frame",
        help="frame: train the projection towards the reserved vectors of the frame (NC-FSCIL); cosine: a learnable vector for each class; "
        "ncm: nearest class mean, without training.",
    )
    parser.add_argument("--seed", type=int, default=0, help="Chooses the shots.")
    parser.add_argument("--steps", type=PositiveInt, default=200, help="Steps of SGD in each session.")
    parser.add_argument(
        "--lr", type=float | None, default=None, help="Learning rate at first. Default: 2.5 for frame, 0.1 for cosine."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu …; by default a GPU if there is one.")
    parser.add_argument(
        "--devices", type=PositiveInt, default=1, help="Processes, which share the images of the backbone."
    )
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="Folder for the results. Default: incremental/METHOD_Nway_Kshot_seedS in the run folder.",
    )
    add_imports(parser)
    return parser
