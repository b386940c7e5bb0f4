import numpy as np
import pytest

from etflight import plotting, simplex_etf

W = simplex_etf(4, 8).numpy()
LINE = np.outer([0.0, 1.0, 2.0], np.ones(3))


@pytest.mark.parametrize(
    ("draw", "arguments", "reason"),
    [
        (plotting.triangle, (W, range(4), W, (0, 1, 1)), "three different labels from 0 to 3"),
        (plotting.triangle, (W, range(4), W, (0, 1, 4)), "three different labels"),
        (plotting.triangle, (LINE, range(3), LINE, (1, 0, 2)), "one line"),
        (
            plotting.score_histograms,
            ({"energy": ([0.5, np.nan, 1.0], [0.5])}, "a", "b"),
            "1 of 4 scores of energy are NaN",
        ),
        (plotting.score_histograms, ({"energy": ([0.5], [0.5, np.inf])}, "a", "b"), "1 of 3 scores of energy are NaN"),
        (plotting.collapse_curves, ({"val/acc": [1.0]}, [0]), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        draw(*arguments)
