import numpy as np
import pytest
import torch

from etflight import plotting


def heights(patch, bins):
    """The heights of a histogram's bins, from the outline that is drawn."""
    return patch.get_xy()[1 : 2 * bins : 2, 1]


def test_score_histograms_have_area_one_and_count_extreme_scores_in_the_last_bins():
    g = torch.Generator().manual_seed(0)
    known = torch.cat([2 + torch.randn(999, generator=g), torch.tensor([1e6])])
    unknown = torch.randn(50, generator=g)
    figure = plotting.score_histograms({"energy: AUROC 90.1 %": (known, unknown)}, "known: A", "unknown: B")
    (axes,) = figure.axes
    assert axes.get_title() == "energy: AUROC 90.1 %"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["known: A", "unknown: B"]
    low, high = axes.patches[0].get_xy()[:, 0].min(), axes.patches[0].get_xy()[:, 0].max()
    assert high < 10
    for patch, values in zip(axes.patches, (known.double(), unknown.double()), strict=True):
        counts, _ = np.histogram(values.clip(low, high), 14, (low, high))  # 2 sqrt(50)
        np.testing.assert_allclose(heights(patch, 14) * (high - low) / 14, counts / len(values), atol=1e-3)
    plotting.render(figure)


@pytest.mark.parametrize("number", [1, 3, 9, 13])
def test_every_score_has_a_panel_even_if_it_is_one_number(number):
    panels = {f"score {i}": (torch.ones(5), torch.ones(3)) for i in range(number)}
    figure = plotting.score_histograms(panels, "known", "unknown")
    assert [axes.get_title() for axes in figure.axes] == list(panels)
    plotting.render(figure)
