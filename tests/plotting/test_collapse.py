import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from etflight import plotting
from etflight.metrics import ClassStatistics, measures


def random(*shape):
    return np.random.default_rng(0).normal(size=shape)


def cosines(means, weight):
    return 1 - cdist(means - means.mean(0), weight - weight.mean(0), "cosine")


@pytest.mark.parametrize("K", [12, 13])
def test_heat_map_shows_the_cosines_and_of_few_classes_writes_them(K):
    means, weight = random(2, K, 16) + 3
    axes = plotting.cosine_heatmap(torch.tensor(means), torch.tensor(weight)).axes[0]
    expected = cosines(means, weight)
    np.testing.assert_allclose(axes.images[0].get_array(), expected, atol=1e-12)
    assert axes.images[0].get_clim() == (-1, 1)
    written = [f"{value:.2f}".replace("-", "−") for value in expected.flat] if K == 12 else []
    assert [text.get_text() for text in axes.texts] == written


def test_heat_map_diagonal_is_the_measures_class_alignment_with_classes_missing():
    statistics = ClassStatistics(5, 8)
    statistics.update(torch.tensor(random(6, 8), dtype=torch.float32), torch.tensor([0, 0, 1, 3, 3, 4]))
    moments, weight = statistics.compute(), torch.tensor(random(5, 8))
    figure = plotting.portrait(moments, weight)["heat_map"]
    image = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
    np.testing.assert_allclose(np.diag(image), measures.class_alignment(moments, weight), atol=1e-12)
    missing = np.arange(5) == 2
    np.testing.assert_array_equal(np.isnan(image), missing[:, None] | missing)


def test_heat_map_of_too_many_classes_shows_an_even_choice_and_says_so():
    means, weight = random(2, 2500, 3)
    axes = plotting.cosine_heatmap(means, weight).axes[0]
    image = axes.images[0].get_array()
    assert image.shape == (1000, 1000)
    assert "1000 of 2500" in axes.get_title()
    assert image[-1, -1] == pytest.approx(cosines(means, weight)[-1, -1])


def test_variability_points_are_counts_and_variances_but_for_variance_zero_and_missing_classes():
    figure = plotting.variability_by_size(torch.tensor([0.5, 0.1, 0.0, np.nan]), [10, 1000, 1, 0], list("abcd"))
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[10, 0.5], [1000, 0.1]], rtol=1e-6)
    assert axes.collections[1].get_offsets()[:, 0].tolist() == [1]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")
    assert sorted(text.get_text() for text in axes.texts) == ["a", "b", "hollow: variance 0"]
    plotting.render(figure)


def test_variability_of_many_classes_is_logarithmic_and_names_only_the_extremes():
    axes = plotting.variability_by_size(np.arange(1, 51) / 50, np.arange(50, 0, -1)).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == [0, 1, 2, 47, 48, 49]
    assert axes.get_yscale() == "log"


def test_spectrum_lies_beside_a_flat_one_of_the_same_norm():
    values = torch.tensor([2.0, 3.0, 1.0])
    figure = plotting.spectrum(values)
    ours, flat = figure.axes[0].lines
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1, 2, 3], [3, 2, 1])
    assert sum(values**2) == pytest.approx(3 * flat.get_ydata()[0] ** 2)
    share = values / 6
    assert f"{float((-(share * share.log()).sum()).exp()):.1f} of 3" in figure.axes[0].get_title()
    plotting.render(figure)


def test_one_class_has_no_spectrum():
    statistics = ClassStatistics(3, 4)
    statistics.update(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))
    assert set(plotting.portrait(statistics.compute(), torch.eye(3, 4))) == {"variability"}
