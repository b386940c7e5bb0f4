import numpy as np
import pytest

from etflight import plotting


def test_curves_are_the_results_and_the_base_session_has_no_new_classes():
    results = [
        {"acc": 0.9, "acc_base": 0.9, "acc_new": None},
        {"acc": 0.8, "acc_base": 0.85, "acc_new": 0.5},
        {"acc": 0.7, "acc_base": 0.8, "acc_new": 0.4},
    ]
    figure = plotting.session_curves(results, [6, 8, 10])
    (axes,) = figure.axes
    drawn = {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}
    assert list(drawn) == ["all classes seen", "base classes", "new classes"]
    for name, (x, y) in zip(("acc", "acc_base", "acc_new"), drawn.values(), strict=True):
        np.testing.assert_array_equal(x, [0, 1, 2])
        np.testing.assert_array_equal(y, np.array([row[name] for row in results], float))
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0\n6", "1\n8", "2\n10"]
    plotting.render(figure)


def test_no_session_is_refused():
    with pytest.raises(ValueError, match="no session"):
        plotting.session_curves([], [])
