"""Few-shot class-incremental learning: a trained model takes on new classes from a few images each, without its old images.

The backbone does not change after the base session, so everything here works on its pooled features. Of each earlier class only the mean
feature is kept. Classes are numbered in the order in which they come.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflight.analysis.learners import Learner, class_means
from etflight.utils.errors import UserError, brief, let_through
from etflight.utils.precision import refuse_not_finite


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
