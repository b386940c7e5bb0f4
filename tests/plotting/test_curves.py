import numpy as np
import pytest

from etflight import plotting

NAMES = ["nc1", "alignment", "alignment_std", "nc2_equinorm", "nc2_equiangularity", "etf_distance"]
NAMES += [f"{name}{end}" for name in ("cos_means", "cos_weights", "cos_cross") for end in ("", "_std")]


def lines(figure):
    shown = [line for axes in figure.axes for line in axes.lines if line.get_label().startswith("nc")]
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in shown}


def test_curves_are_the_history_over_its_epochs():
    keys, epochs = [f"nc/{split}/{name}" for split in ("val", "train") for name in NAMES], [0, 2, 4, 6]
    recorded = {key: [(i + 1) * 10.0 ** (-epoch) for epoch in epochs] for i, key in enumerate(keys)}
    figure = plotting.collapse_curves(recorded, epochs, num_classes=10)
    expected = {key: (epochs, values) for key, values in recorded.items() if not key.endswith("_std")}
    assert lines(figure) == expected
    assert figure.axes[0].get_yscale() == "log"
    assert [axes.get_yscale() for axes in figure.axes[1:]] == ["linear"] * 3
    assert [len(axes.collections) for axes in figure.axes] == [0, 1, 0, 3]  # bands of train where there is an _std
    (simplex,) = [line for line in figure.axes[3].lines if "simplex" in line.get_label()]
    assert list(simplex.get_ydata()) == pytest.approx([-1 / 9] * 2)
    plotting.render(figure)


def test_splits_have_line_styles_train_first_and_a_late_measure_belongs_to_the_last_epochs():
    figure = plotting.collapse_curves({"nc/val/nc1": [5.0], "nc/train/nc1": [3.0, 2.0, 1.0]}, [0, 1, 2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "val"]
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles == {"nc/train/nc1": "-", "nc/val/nc1": "--"}
    np.testing.assert_array_equal(lines(figure)["nc/val/nc1"][1], [np.nan, np.nan, 5.0])


def test_curves_without_scatter_show_the_ratio_and_say_what_was_not_measured():
    recorded = {"nc_raw/train/nc1_ratio": [3.0, 2.0], "nc/train/nc1": [1.0, 1.0]}
    figure = plotting.collapse_curves(recorded, [0, 1], prefix="nc_raw")
    assert set(lines(figure)) == {"nc_raw/train/nc1_ratio"}
    assert [text.get_text() for axes in figure.axes[1:] for text in axes.texts] == ["not measured"] * 3
