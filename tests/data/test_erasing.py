"""Cutout and random erasing."""

import numpy as np
import torch

from etflight.data.erasing import draw_cutouts, draw_erasings, erase


def test_cutout_empties_a_square_around_any_pixel():
    cutouts = draw_cutouts(4000, 16, 32, 32, np.random.default_rng(0))
    top, bottom, left, right = cutouts
    assert (bottom - top == 16).all()
    assert (right - left == 16).all()
    assert top.min() == -8
    assert top.max() == 23
    assert left.min() == -8
    assert left.max() == 23
    emptied = erase(torch.ones(4000, 3, 32, 32), cutouts)
    for i in range(20):
        expected = torch.ones(3, 32, 32)
        expected[:, max(top[i], 0) : max(bottom[i], 0), max(left[i], 0) : max(right[i], 0)] = 0
        assert torch.equal(emptied[i], expected)


def test_erasing_has_the_areas_aspects_and_odds_of_its_paper():
    top, bottom, left, right = draw_erasings(20_000, 0.25, 64, 64, np.random.default_rng(0))
    high, wide = bottom - top, right - left
    erased = (high > 0) & (wide > 0)
    assert abs(erased.mean() - 0.25) < 0.02
    assert (top >= 0).all()
    assert (bottom <= 64).all()
    assert (left >= 0).all()
    assert (right <= 64).all()
    area = (high * wide)[erased] / 64**2
    assert area.min() > 0.015
    assert area.max() < 0.36
    assert abs(area.mean() - 0.175) < 0.01
    aspect = np.log(high[erased] / wide[erased])
    assert abs(aspect.mean()) < 0.05
    assert abs(aspect).max() < 1.35
