import numpy as np
import pytest
import torch
from matplotlib.text import Text

from etflight import plotting
from etflight.metrics import ClassStatistics, measures
from tests.plotting.pixels import drawn


def cosines(means: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """cos(μ_i - μ_G, w_j - w̄), one pair at a time."""
    M, W = means - means.mean(0), weight - weight.mean(0)
    return np.array([[m @ w / np.sqrt((m @ m) * (w @ w)) for w in W] for m in M])


# The heat map


def test_heat_map_shows_the_cosines_of_centred_means_and_class_vectors(noise, tmp_path):
    means, weight = noise.normal(size=(7, 16)) + 3, noise.normal(size=(7, 16))
    figure = plotting.cosine_heatmap(torch.tensor(means), torch.tensor(weight))
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), cosines(means, weight), atol=1e-12)
    assert image.get_clim() == (-1, 1)
    assert len(np.unique(drawn(figure, tmp_path).reshape(-1, 3), axis=0)) > 50


def test_heat_map_writes_values_into_cells_of_few_classes_only(noise):
    for K in (12, 13):
        means, weight = noise.normal(size=(K, 16)), noise.normal(size=(K, 16))
        texts = [text.get_text() for text in plotting.cosine_heatmap(means, weight).axes[0].texts]
        expected = [f"{value:.2f}".replace("-", "−") for value in cosines(means, weight).flat] if K == 12 else []
        assert texts == expected


def test_heat_map_diagonal_is_the_measures_class_alignment_with_classes_missing(noise):
    statistics = ClassStatistics(5, 8)
    labels = torch.tensor([0, 0, 1, 3, 3, 4])
    statistics.update(torch.tensor(noise.normal(size=(6, 8)), dtype=torch.float32), labels)
    moments, weight = statistics.compute(), torch.tensor(noise.normal(size=(5, 8)))
    for global_mean in ("class", "sample"):
        for center_weight in (True, False):
            figure = plotting.cosine_heatmap(
                moments.means, weight, global_mean=global_mean, counts=moments.counts, center_weight=center_weight
            )
            image = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
            expected = measures.class_alignment(moments, weight, global_mean=global_mean, center_weight=center_weight)
            np.testing.assert_allclose(np.diag(image), expected.numpy(), atol=1e-12)
            assert np.isnan(image[2]).all()
            assert np.isnan(image[:, 2]).all()
            assert np.isfinite(np.delete(np.delete(image, 2, 0), 2, 1)).all()


def test_heat_map_names_classes_and_thins_them_when_many(noise):
    for K, most in ((10, 10), (40, 40), (100, 20), (1000, 20)):
        means, weight = noise.normal(size=(K, 4)), noise.normal(size=(K, 4))
        axes = plotting.cosine_heatmap(means, weight, [f"class {k}" for k in range(K)]).axes[0]
        for ticks, labels in (
            (axes.get_xticks(), axes.get_xticklabels()),
            (axes.get_yticks(), axes.get_yticklabels()),
        ):
            assert 8 <= len(ticks) <= most
            assert [label.get_text() for label in labels] == [f"class {int(k)}" for k in ticks]


def test_heat_map_of_too_many_classes_shows_an_even_choice_and_says_so(noise):
    means, weight = noise.normal(size=(2500, 3)), noise.normal(size=(2500, 3))
    axes = plotting.cosine_heatmap(means, weight).axes[0]
    image = axes.images[0].get_array()
    assert image.shape == (1000, 1000)
    assert "1000 of 2500" in axes.get_title()
    full = cosines(means[[0, 2499]] - means.mean(0), weight[[0, 2499]] - weight.mean(0))
    assert full.shape == (2, 2)
    M, W = means - means.mean(0), weight - weight.mean(0)
    corner = M[-1] @ W[-1] / np.linalg.norm(M[-1]) / np.linalg.norm(W[-1])
    assert image[-1, -1] == pytest.approx(corner)


def test_heat_map_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[4, 4\]"):
        plotting.cosine_heatmap(np.zeros((3, 4)), np.zeros((4, 4)))


# Class by class


def test_variability_points_are_counts_and_variances(tmp_path):
    variances, counts = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([10, 100, 1000])
    figure = plotting.variability_by_size(variances, counts, ["a", "b", "c"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[10, 0.5], [100, 0.2], [1000, 0.1]], rtol=1e-6)
    assert axes.get_xscale() == "log"
    assert sorted(text.get_text() for text in axes.texts) == ["a", "b", "c"]
    drawn(figure, tmp_path)


def test_variability_marks_variance_zero_and_leaves_missing_classes_out():
    axes = plotting.variability_by_size([0.5, 0.0, np.nan], [10, 1, 0]).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[10, 0.5]]
    assert axes.collections[1].get_offsets()[:, 0].tolist() == [1]
    assert [text.get_text() for text in axes.texts if "hollow" in text.get_text()]


def test_variability_names_only_the_extremes_of_many_classes():
    variances = np.arange(1, 51) / 50
    axes = plotting.variability_by_size(variances, np.arange(50, 0, -1)).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == [0, 1, 2, 47, 48, 49]


def test_names_of_classes_of_one_size_do_not_cover_each_other(tmp_path):
    figure = plotting.variability_by_size([0.1, 0.1001, 0.1002, 0.2], [50] * 4, ["one", "two", "three", "four"])
    drawn(figure, tmp_path)
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_spectrum_lies_beside_a_flat_one_of_the_same_norm(tmp_path):
    values = torch.tensor([3.0, 2.0, 1.0])
    figure = plotting.spectrum(values)
    ours, flat = figure.axes[0].lines
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1, 2, 3], [3, 2, 1])
    assert sum(values**2) == pytest.approx(3 * flat.get_ydata()[0] ** 2)
    share = values / 6
    rank = float((-(share * share.log()).sum()).exp())
    assert f"{rank:.1f} of 3" in figure.axes[0].get_title()
    drawn(figure, tmp_path)


def test_empty_spectrum_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        plotting.spectrum(torch.zeros(0))
