import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.text import Text
from PIL import Image

from etflight import plotting


def test_figures_are_unknown_to_pyplot_and_can_be_saved_in_threads(tmp_path):
    paths = [tmp_path / "figures" / f"{i}.png" for i in range(3)]
    workers = [threading.Thread(target=plotting.save, args=(plotting.spectrum([3, 2, 1]), path)) for path in paths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert pyplot.get_fignums() == []
    plotting.save(plotting.render(plotting.spectrum([1, 1])), paths[0])  # takes the place of the old one
    assert sorted(paths[0].parent.iterdir()) == paths
    assert paths[0].read_bytes() != paths[1].read_bytes()
    assert Image.open(paths[0]).size == (840, 576)


@pytest.mark.parametrize(("num_classes", "named"), [(10, 10), (43, 43), (1000, 20)])
def test_names_of_classes_are_thinned_until_none_covers_another(num_classes, named):
    figure = plotting.confusion_matrix(torch.eye(num_classes), [f"a road sign, {k}" for k in range(num_classes)])
    axes = figure.axes[0]
    for ticks, labels in ((axes.get_xticks(), axes.get_xticklabels()), (axes.get_yticks(), axes.get_yticklabels())):
        assert [label.get_text() for label in labels] == [f"a road sign, {int(k)}" for k in ticks]
        assert len(labels) == named
    plotting.render(figure)
    boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))


def test_names_of_points_do_not_cover_each_other():
    figure = plotting.variability_by_size([0.1, 0.1001, 0.1002, 0.2], [50] * 4, ["one", "two", "three", "four"])
    plotting.render(figure)
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]  # without their lines
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_dollar_in_a_name_starts_no_formula():
    names = ["US$ and NZ$", r"$\frac$", "$", "$x_{$"]
    plotting.render(plotting.confusion_matrix(torch.eye(4), names))
    plotting.render(plotting.accuracy_by_size(np.ones(4), np.arange(4) + 1, names))
