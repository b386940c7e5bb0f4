"""Few-shot class-incremental learning as data: which classes come in which session, and with which images."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from etflight.utils.errors import UserError


class Session(NamedTuple):
    """One session; classes are numbered in the order in which they come, so those seen so far are the first ones.

    Attributes:
        number: 0 for the base session, then 1, 2, …
        new: The classes that come in it.
        shots: Int64 `[n · k]`, the positions of the k training images of each new class, one class after the other; empty in the base
            session, which trains on all its images.
    """

    number: int
    new: range
    shots: NDArray[np.int64]

    @property
    def seen(self) -> int:
        """The number of classes seen when the session is over."""
        return self.new.stop


def few_shot_sessions(
    labels: NDArray[np.int64],
    num_classes: int,
    *,
    base: int,
    way: int,
    shots: int,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
) -> list[Session]:
    """Divide the classes of a set into a base session and sessions of a few new classes with a few images each.

    The images of a class depend on the seed and the class's place in the order alone: with more shots there are those of fewer shots and
    others, and another `way` does not change them.

    Args:
        labels: Classes of all training images, `[N]`, in the order in which the classes come.
        num_classes: The number of classes K.
        base: The number of classes of the base session.
        way: The number of new classes of each later session; it divides K - base.
        shots: The number k of training images of each new class.
        seed: The seed of the choice of images, 0 or more.
        class_names: The K names, for errors.

    Returns:
        The base session and the (K - base)/way sessions after it.

    Raises:
        UserError: A number is out of range, `way` does not divide the number of new classes, or a class has fewer images than shots.

    Example:
        >>> labels = np.array([0, 0, 1, 1, 2, 2, 2, 3, 3])
        >>> [(list(s.new), s.shots.tolist()) for s in few_shot_sessions(labels, 4, base=2, way=1, shots=2)]
        [([0, 1], []), ([2], [5, 6]), ([3], [7, 8])]
    """
    left = num_classes - base
    if shots < 1:
        raise UserError(f"shots is {shots}: a session without images teaches nothing: give at least 1")
    if way < 1:
        raise UserError(f"way is {way}: give at least 1 new class in each session")
    if seed < 0:
        raise UserError(f"seed is {seed}: give 0 or more")
    if left < 1:
        raise UserError(f"the base session has all {num_classes} classes, so no new one is left: train it on fewer")
    if left % way:
        ways = ", ".join(str(n) for n in range(1, left + 1) if left % n == 0)
        raise UserError(f"way is {way}, which does not divide the {left} new classes: give one of {ways}")
    sessions = [Session(0, range(base), np.empty(0, np.int64))]
    for number, first in enumerate(range(base, num_classes, way), start=1):
        new = range(first, first + way)
        chosen = [_shots(labels, k, shots, seed, class_names) for k in new]
        sessions.append(Session(number, new, np.concatenate(chosen)))
    return sessions


def _shots(
    labels: NDArray[np.int64], k: int, shots: int, seed: int, class_names: Sequence[str] | None
) -> NDArray[np.int64]:
    own = np.flatnonzero(labels == k)
    if len(own) < shots:
        name = f" ({class_names[k]})" if class_names else ""
        raise UserError(
            f"class {k}{name} has {len(own)} training images, but {shots} shots were asked for: ask for fewer"
        )
    return np.sort(np.random.default_rng([seed, k]).permutation(own)[:shots])
