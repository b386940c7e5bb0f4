import numpy as np
import torch

from etflight import plotting
from etflight.metrics import Reliability


def bins(sharpness=1.0):
    generator = torch.Generator().manual_seed(0)
    metric = Reliability()
    metric.update(sharpness * torch.randn(200, 5, generator=generator), torch.randint(5, (200,), generator=generator))
    return metric.compute()


def test_reliability_diagram_has_bars_of_accuracy_and_gaps_to_the_confidence():
    raw, calibrated = bins(3), bins(0.2)
    figure = plotting.reliability_diagram({"raw": raw, "temperature 15": calibrated})
    for axes, shown in zip(figure.axes[:2], (raw, calibrated), strict=True):
        accuracy, gaps = axes.containers
        np.testing.assert_allclose([bar.get_height() for bar in accuracy], shown.accuracy)
        np.testing.assert_allclose([bar.get_y() + bar.get_height() for bar in gaps], shown.confidence)
        assert f"ECE {100 * shown.ece:.1f} %" in axes.get_title()
    shares = [bar.get_height() for bar in figure.axes[2].containers[0]]
    np.testing.assert_allclose(shares, raw.counts / 200)
    plotting.render(figure)


def test_confusion_matrix_shows_shares_of_the_true_class():
    counts = torch.tensor([[998, 2, 0], [5, 5, 0], [0, 0, 0]])  # the last class has no images
    figure = plotting.confusion_matrix(counts, ["cat", "dog", "emu"])
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array().filled(np.nan), [[0.998, 0.002, 0], [0.5, 0.5, 0], [np.nan] * 3])
    assert [text.get_text() for text in figure.axes[0].texts] == ["100", "<1", "50", "50"]
    assert [text.get_color() for text in figure.axes[0].texts] == ["white", "black", "white", "white"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["cat", "dog", "emu"]
    plotting.render(figure)


def test_accuracy_by_size_has_a_point_for_each_class_that_was_tested_and_the_limits_of_the_groups():
    accuracy, counts = torch.tensor([0.9, torch.nan, 0.0, 0.5]), torch.tensor([500, 80, 3, 0])
    axes = plotting.accuracy_by_size(accuracy, counts).axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[500, 0.9], [3, 0.0]])
    assert [line.get_xdata()[0] for line in axes.lines] == [20, 100]
    assert {"few", "many", "0", "2"} == {text.get_text() for text in axes.texts}
    low, high = axes.get_ylim()
    assert low < 0 < 1 < high
    many = plotting.accuracy_by_size(torch.linspace(1, 0.5, 43), torch.arange(43) + 200).axes[0]
    assert [text.get_text() for text in many.texts] == ["42", "41", "40"]  # the worst
