import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etflight.data.sessions import few_shot_sessions
from etflight.utils.errors import UserError

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 12))


def sessions(**changes):
    return few_shot_sessions(LABELS, 10, **{"base": 6, "way": 2, "shots": 3} | changes)


@given(base=st.integers(1, 9), way=st.integers(1, 9), shots=st.integers(1, 12), seed=st.integers(0, 2**32))
def test_sessions_have_all_classes_once_in_order_and_as_many_images_of_each_new_one(base, way, shots, seed):
    if (10 - base) % way:
        with pytest.raises(
            UserError, match=f"way is {way}, which does not divide the {10 - base} new classes: give one of 1"
        ):
            sessions(base=base, way=way)
        return
    found = sessions(base=base, way=way, shots=shots, seed=seed)
    assert [k for session in found for k in session.new] == list(range(10))
    assert [session.number for session in found] == list(range(1 + (10 - base) // way))
    assert [session.seen for session in found] == list(range(base, 11, way))
    assert len(found[0].shots) == 0
    for session in found[1:]:
        assert LABELS[session.shots].tolist() == np.repeat(session.new, shots).tolist()
        assert len(set(session.shots.tolist())) == way * shots


def by_class(found):
    return {int(LABELS[i]): set() for s in found for i in s.shots} | {
        k: {int(i) for s in found for i in s.shots if LABELS[i] == k} for k in range(6, 10)
    }


def test_shots_of_a_class_depend_on_the_seed_alone_and_more_of_them_hold_the_fewer():
    few = by_class(sessions(seed=5))
    assert by_class(sessions(seed=5)) == few == by_class(sessions(seed=5, way=1)) == by_class(sessions(seed=5, way=4))
    more = by_class(sessions(seed=5, shots=8))
    assert all(few[k] < more[k] for k in few)
    assert by_class(sessions(seed=6)) != few


def test_every_image_of_a_class_can_be_a_shot():
    chosen = {int(i) for seed in range(60) for session in sessions(seed=seed) for i in session.shots}
    assert chosen == set(np.flatnonzero(LABELS >= 6).tolist())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shots": 0}, "shots is 0: a session without images teaches nothing: give at least 1"),
        ({"way": 0}, "way is 0: give at least 1 new class"),
        ({"seed": -1}, "seed is -1: give 0 or more"),
        ({"base": 10}, "the base session has all 10 classes, so no new one is left"),
        ({"way": 3}, "way is 3, which does not divide the 4 new classes: give one of 1, 2, 4"),
        ({"shots": 13}, r"class 6 \(six\) has 12 training images, but 13 shots were asked for: ask for fewer"),
    ],
)
def test_what_cannot_be_divided_is_one_line(changes, message):
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    with pytest.raises(UserError, match=message):
        sessions(class_names=names, **changes)
