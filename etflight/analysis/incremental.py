"""Few-shot class-incremental learning: a trained model takes on new classes from a few images each, without its old images.

The backbone does not change after the base session, so everything here works on its pooled features. Of each earlier class only the mean
feature is kept. Classes are numbered in the order in which they come.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from etflight.analysis.learners import Learner, class_means
from etflight.analysis.outputs import outputs, split_features
from etflight.classifier import Classifier
from etflight.data import ClassSubset, ImageDataModule
from etflight.data.sessions import Session
from etflight.utils.errors import UserError, argument, brief, let_through
from etflight.utils.files import replacing
from etflight.utils.precision import refuse_not_finite

_METADATA = "etflight"  # the entry of a state file that holds what are not tensors


class Progress(NamedTuple):
    """What is known after a session; the next one needs nothing else of the past.

    Attributes:
        learnt: The state of the learner.
        memory: The mean features of the classes seen so far, `[seen, d]`.
        results: The results of each session so far, as `score` gives them.
    """

    learnt: dict[str, Tensor]
    memory: Tensor
    results: list[dict[str, Any]]


class Features(NamedTuple):
    """The backbone's features of all images that the sessions need, and their classes in the order in which these come.

    Attributes:
        base: The mean features of the base classes, `[K_0, d]`.
        shots: For each session after the base session, the features of its shots, `[n, d]`, and their classes, `[n]`.
        test: The features of the test images of all classes, `[N, d]`, and their classes, `[N]`.
    """

    base: Tensor
    shots: Sequence[tuple[Tensor, Tensor]]
    test: tuple[Tensor, Tensor]


def all_classes(base: ImageDataModule) -> ClassSubset:
    """The set of a base session with all its classes: those of the base session first, then the others in their order.

    Raises:
        UserError: The base session has all classes already.
    """
    if not isinstance(base, ClassSubset):
        raise UserError(
            f"the base session was trained on all classes of {base}, so none is left to come: train it on some "
            f"({argument('data', 'ClassSubset')} {argument('data.images', type(base).__name__)} "
            f"{argument('data.classes', f'0-{max(base.num_classes // 2, 2) - 1}')})"
        )
    later = sorted({*range(base.images.num_classes)} - {*base.labels})
    loading = {name: getattr(base, name) for name in ("mean", "std", "batch_size", "eval_batch_size", "num_workers")}
    return ClassSubset(images=base.images, classes=",".join(map(str, [*base.labels, *later])), **loading)


def session_features(
    model: Classifier,
    base: ImageDataModule,
    every: ClassSubset,
    sessions: Sequence[Session],
    learner: Learner,
    device: torch.device | None = None,
    *,
    folder: Path | None = None,
) -> Features:
    """Run the backbone over all images once, and let the learner begin; processes share the images.

    Args:
        model: The model of the base session.
        base: The data module of the base session.
        every: That of all classes, `all_classes(base)`.
        sessions: The sessions, the base session first.
        learner: The learner.
        device: The device to compute on, to which the model is moved; None: where the model is.
        folder: A folder of stores as of `split_features`, with one in it for the images of all classes; None: nothing is stored.

    Raises:
        UserError: A class has no image, a shot cannot be read, or the folder has other features.
    """
    trained_on = outputs(model, base, "train", device, folder=folder)
    refuse_empty_classes("training", trained_on.labels, base)
    learner.begin(trained_on.embedding, trained_on.labels)
    folder = folder and folder / "all_classes"
    tested_on = split_features(model, every, "test", device, folder=folder)
    refuse_empty_classes("test", tested_on.labels, every)
    base_means = class_means(trained_on.features, trained_on.labels)
    shots = _shots(model, every, sessions[1:], device, folder)
    return Features(base_means, shots, (tested_on.features, tested_on.labels))


def refuse_empty_classes(kind: str, labels: Tensor, data: ImageDataModule) -> None:
    """Refuse images `[N]` of which a class has none.

    Args:
        kind: "training" or "test", for the error.
        labels: The classes of the images that could be read.
        data: Their data module.

    Raises:
        UserError: A class has none.
    """
    counts = labels.bincount(minlength=data.num_classes).tolist()
    if 0 in counts:
        name = data.class_names[counts.index(0)]
        raise UserError(f"{data}: class {name} has no {kind} image that can be read: add some, or leave the class out")


def _shots(
    model: Classifier, data: ClassSubset, sessions: Sequence[Session], device: torch.device | None, folder: Path | None
) -> list[tuple[Tensor, Tensor]]:
    """The features and classes of each session's shots, not augmented."""
    split = data.split("train")
    positions = np.concatenate([session.shots for session in sessions])
    chosen = data.make_split("train", split.source, split.indices.numpy()[positions])
    chosen.labels = split.labels[positions]
    # other shots are other images: each choice has its own store
    folder = folder and folder / f"shots_{sha256(split.indices.numpy()[positions].astype('<i8').data).hexdigest()[:12]}"
    features, labels = split_features(model, data.with_test_images(chosen), "test", device, folder=folder)
    if len(labels) < len(positions):
        other = argument("seed")
        raise UserError(f"{data}: an image that was chosen as a shot cannot be read: mend it, or give another {other}")
    sizes = [len(session.shots) for session in sessions]
    return list(zip(torch.split(features.float(), sizes), torch.split(labels, sizes), strict=True))


def run_sessions(learner: Learner, features: Features, before: Progress | None = None) -> Iterator[Progress]:
    """Go through the base session, which is only tested, and the sessions after it.

    Args:
        learner: The learner as the base session leaves it, after its `begin`.
        features: All features.
        before: What was known after the last session of an earlier run, which goes on after it.

    Yields:
        What is known after each session.

    Raises:
        UserError: `before` is not of this learner, a session diverges, or a feature is not finite.
    """
    shots_of = [(f"features of session {number}'s shots", part) for number, (part, _) in enumerate(features.shots, 1)]
    for what, rows in (
        ("features of base classes", features.base),
        *shots_of,
        ("features of test images", features.test[0]),
    ):
        refuse_not_finite(what, rows)
    memory, results = (features.base, []) if before is None else (before.memory, before.results)
    if before is not None:
        try:
            learner.load(before.learnt, len(memory))
        except (KeyError, RuntimeError) as error:
            let_through(error)
            what = f"the state after session {len(results) - 1}"
            raise UserError(f"{what} is damaged, or of another learner ({brief(error)}): remove it") from error
    for number in range(len(results), len(features.shots) + 1):
        if number > 0:
            shots, labels = features.shots[number - 1]
            learner.learn(shots, labels, memory)
            memory = torch.cat([memory, class_means(shots, labels - len(memory))])
        images, classes = features.test
        known = classes < len(memory)
        with torch.no_grad():
            decisions = learner.logits(images[known]).argmax(dim=1)
        results = [*results, score(number, decisions, classes[known], len(features.base), results)]
        yield Progress(learner.state(), memory, results)


def score(
    number: int, decisions: Tensor, labels: Tensor, base: int, earlier: Sequence[dict[str, Any]] = ()
) -> dict[str, Any]:
    """Say how good the decisions after a session are.

    Args:
        number: The number of the session.
        decisions: The classes decided for, `[N]`.
        labels: The right ones, `[N]`.
        base: The number of base classes.
        earlier: The results of the sessions before.

    Returns:
        `session`, `acc` (of all test images of the classes seen so far), `acc_base`, `acc_new` (of the classes that came after the base
        session; None if there are none), and `forgetting` (the fall of `acc_base` since the base session). Accuracies lie in [0, 1].
    """
    right, of_base = decisions == labels, labels < base
    acc_base = _mean(right[of_base])
    first = earlier[0]["acc_base"] if earlier else acc_base
    return {
        "session": number,
        "acc": _mean(right),
        "acc_base": acc_base,
        "acc_new": None if bool(of_base.all()) else _mean(right[~of_base]),
        "forgetting": first - acc_base,
    }


def summary(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Sum up all sessions.

    Args:
        results: The results of all sessions.

    Returns:
        `performance_drop` (PD), the fall of `acc` from the base session to the last one, and `average_acc`, the mean of `acc` over
        all sessions.
    """
    accuracies = [row["acc"] for row in results]
    return {"performance_drop": accuracies[0] - accuracies[-1], "average_acc": sum(accuracies) / len(accuracies)}


def _mean(right: Tensor) -> float:
    return int(right.sum()) / len(right)


# States -------------------------------------------------------------------------------------------------------------


def state_file(folder: Path, session: int) -> Path:
    """The file of the state after a session."""
    return folder / f"session_{session}.safetensors"


def save_state(folder: Path, settings: Mapping[str, Any], done: Progress) -> None:
    """Write the state after the last finished session.

    Args:
        folder: The folder of all states.
        settings: All that the numbers depend on, as plain data.
        done: What is known after the session.
    """
    tensors = {"memory": done.memory, **{f"learnt.{name}": value for name, value in done.learnt.items()}}
    metadata = json.dumps({"settings": settings, "results": done.results})
    with replacing(state_file(folder, len(done.results) - 1)) as partial:
        save_file({name: value.contiguous() for name, value in tensors.items()}, partial, {_METADATA: metadata})


def last_state(folder: Path, settings: Mapping[str, Any]) -> Progress | None:
    """The state after the last finished session, or None.

    Args:
        folder: The folder of all states.
        settings: All that the numbers depend on, as plain data.

    Raises:
        UserError: The folder's sessions have other settings, or a state cannot be read.
    """
    finished = 0
    while state_file(folder, finished).is_file():
        finished += 1
    if not finished:
        return None
    known, done = _read_state(state_file(folder, finished - 1))
    for name, value in settings.items():
        if known.get(name) != value:
            saved, now = (shorten(str(content), 80, placeholder=" …") for content in (known.get(name), value))
            raise UserError(
                f"{folder} holds sessions with other settings ({name}: {saved}, not {now}), which stay as they are: "
                f"give {argument('output')} for another folder"
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
