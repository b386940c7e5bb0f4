import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etflight.data import class_counts
from etflight.data.profiles import fingerprint, long_tailed_subset, training_counts
from etflight.utils.errors import UserError


def the_fields_subset(labels, counts, seed=0):
    """The rule, word for word: in class order, shuffle the class's indices and keep the first n_k."""
    rng = np.random.RandomState(seed)
    chosen = []
    for k, count in enumerate(counts):
        indices = np.where(np.array(labels) == k)[0]
        rng.shuffle(indices)
        chosen.extend(indices[:count].tolist())
    return chosen


@pytest.mark.parametrize(
    ("num_classes", "max_count", "ratio", "total"),
    [
        (10, 5000, 200, 11203), (10, 5000, 100, 12406), (10, 5000, 50, 13996), (10, 5000, 10, 20431),
        (100, 500, 200, 9502), (100, 500, 100, 10847), (100, 500, 50, 12608), (100, 500, 10, 19573),
    ],
)  # fmt: skip
def test_exponential_totals_are_the_published_ones(num_classes, max_count, ratio, total):
    assert class_counts(num_classes, max_count, ratio).sum() == total


def test_step_keeps_the_first_half_full_and_truncates_the_rest_and_none_is_flat():
    assert class_counts(5, 100, 30, "step").tolist() == [100, 100, 3, 3, 3]
    assert class_counts(3, 7, 100, "none").tolist() == [7, 7, 7]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 5, 1), "two classes"),
        ((3, 0, 1), "at least one image"),
        ((3, 10**30, 1), "at most"),
        ((3, 5, 1, "linear"), "exp, step, none"),
        ((3, 5, 0.01), "not its inverse"),
        ((3, 5, float("nan")), "not its inverse"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        class_counts(*arguments)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_subset_is_exactly_the_fields(seed):
    labels = np.random.default_rng(3).integers(0, 10, 3000)
    counts = class_counts(10, 200, 20)
    assert long_tailed_subset(labels, counts, seed).tolist() == the_fields_subset(labels, counts, seed)


def test_the_fingerprint_is_of_the_little_endian_int64_bytes():
    # SHA-256 of `struct.pack('<qq', 1, 2)`
    assert fingerprint(np.array([1, 2], dtype=np.int32)) == fingerprint(np.array([1, 2], dtype=">i8")) == "0c730b69905c"
    assert fingerprint([2, 1]) != fingerprint([1, 2])


@given(
    st.lists(st.integers(1, 3000), min_size=2, max_size=12),
    st.floats(1, 5),
    st.sampled_from(["exp", "step"]),
)
def test_the_default_maximum_is_the_largest_that_every_class_satisfies(available, ratio, profile):
    K = len(available)
    fits = [n for n in range(1, max(available) + 2) if (class_counts(K, n, ratio, profile) <= available).all()]
    largest = class_counts(K, max(fits), ratio, profile)
    if ratio == 1:
        assert training_counts(available, ratio, profile).tolist() == available
    elif largest.min() == 0:
        with pytest.raises(UserError, match="is left with 0 images"):
            training_counts(available, ratio, profile)
    else:
        assert training_counts(available, ratio, profile).tolist() == largest.tolist()


def test_where_there_is_nothing_to_shape_counts_stay():
    assert training_counts([9, 4, 7]).tolist() == [9, 4, 7]
    assert training_counts([9, 4, 7], 100, "none").tolist() == [9, 4, 7]
    assert training_counts([9, 4, 7], 1, "none", max_count=6).tolist() == [6, 4, 6]
    assert training_counts([9, 4, 7], profile=[1, 4, 2]).tolist() == [1, 4, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_count": 10, "imbalance_ratio": 2.0},
            r"class 0 \(cat\) \(and 1 more\) has 9 training images, 10 .* max_count to 7",
        ),
        ({"max_count": 9, "profile": "exp"}, r"class 1 \(dog\) \(and 1 more\) has 4 training images, 9 .* to 4"),
        ({"profile": [9, 5, 7]}, r"class 1 \(dog\) has 4 training images, 5 were asked for: lower its count"),
        ({"profile": [9, 0, 7]}, r"class 1 \(dog\) is left with 0 images"),
        ({"profile": [9, 4]}, "2 counts for 3 classes"),
        ({"profile": [9, 10**30, 7]}, f"a class {10**30} images: give counts of at most"),
        ({"profile": [9, -(10**30), 7]}, "at most"),
        ({"profile": "none", "max_count": 10**30}, f"max_count is {10**30}: .* at most"),
        ({"imbalance_ratio": 50.0}, r"class 2 \(cow\) is left with 0 images"),
    ],
)
def test_what_a_class_cannot_satisfy_is_named(options, message):
    with pytest.raises(UserError, match=message):
        training_counts([9, 4, 7], **options, class_names=["cat", "dog", "cow"])
