"""Pictures of a set of images: how many each class has, and what they look like."""

from collections.abc import Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from etflight.metrics.accuracy import FEW_BELOW, MANY_ABOVE, by_frequency, shot_groups
from etflight.plotting.canvas import (
    BLUE,
    DPI,
    GREEN,
    GREY,
    VERMILION,
    Array,
    Numbers,
    as_array,
    names_or_numbers,
    short,
    single_axes,
)

Pixels = NDArray[np.uint8]

_GROUPS = {
    "many": (BLUE, f"many (> {MANY_ABOVE})"),
    "medium": (GREEN, f"medium ({FEW_BELOW}–{MANY_ABOVE})"),
    "few": (VERMILION, f"few (< {FEW_BELOW})"),
}
_MOST_BARS = 60  # with more, names are too small to read
_MOST_ROWS = 22  # of one block of a contact sheet
_CELL = 0.5  # inches, the side of an image on a contact sheet
_THUMBNAIL = 96  # pixels, for a closer look


def class_histogram(counts: Numbers, class_names: Sequence[str] | None = None, *, title: str | None = None) -> Figure:
    """Training images of each class, from the most to the fewest, coloured by shot group.

    Up to 60 classes are named bars with their numbers; more are one curve, logarithmic where it spans more than a factor of 20.

    Args:
        counts: `[K]`, training images per class.
        class_names: `[K]`; the labels as numbers by default.
        title: The picture's title; a general one by default.

    Returns:
        A figure whose bars, or pieces of the curve, go from the most frequent class to the rarest.
    """
    sizes = as_array(counts)
    names = names_or_numbers(class_names, len(sizes))
    order = by_frequency(torch.as_tensor(sizes)).numpy()
    sizes, names = sizes[order], [names[k] for k in order.tolist()]
    groups = {group: members.numpy() for group, members in shot_groups(torch.as_tensor(sizes)).items() if members.any()}
    few = len(sizes) <= _MOST_BARS
    figure, axes = single_axes(height=max(3.2, 1.2 + 0.21 * len(sizes)) if few else 4.8)
    if few:
        _bars(axes, sizes, groups, names)
    else:
        _curve(axes, sizes, groups)
    axes.legend(handles=[Patch(color=_GROUPS[g][0], label=_GROUPS[g][1]) for g in groups], frameon=False, fontsize=9)
    axes.set_title("Training images of each class" if title is None else title, fontsize=11, parse_math=False)
    return figure


def _bars(axes: Axes, sizes: Array, groups: dict[str, NDArray[np.bool_]], names: Sequence[str]) -> None:
    colours = [next(_GROUPS[group][0] for group in groups if groups[group][i]) for i in range(len(sizes))]
    bars = axes.barh(np.arange(len(sizes)), sizes, color=colours, height=0.78)
    axes.bar_label(bars, labels=[f"{size:,.0f}" for size in sizes], padding=3, fontsize=8, color=GREY)
    axes.set_yticks(np.arange(len(sizes)), [short(name, 32) for name in names], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set(ylim=(len(sizes) - 0.4, -0.6), xlabel="training images")
    axes.margins(x=0.09)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _curve(axes: Axes, sizes: Array, groups: dict[str, NDArray[np.bool_]]) -> None:
    logarithmic = sizes[0] > 20 * max(sizes[-1], 1)
    bottom = 0.7 * max(sizes[-1], 1) if logarithmic else 0.0
    for group, members in groups.items():
        at = np.flatnonzero(members)
        edges = np.append(at, at[-1] + 1) + 0.5  # ranks count from 1
        axes.stairs(sizes[at], edges, baseline=bottom, fill=True, color=_GROUPS[group][0], lw=0)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_ylim(bottom=bottom)
    axes.set(
        xlim=(0.5, len(sizes) + 0.5), xlabel="classes, from the most frequent to the rarest", ylabel="training images"
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def contact_sheet(
    images: Tensor, rows: Tensor, names: Sequence[str], counts: Sequence[int], *, title: str | None = None
) -> Figure:
    """A row of images for each class, beside its name and number of images.

    Images of one channel are grey; of two, their mean is shown; of more than three, the first three.

    Args:
        images: Uint8 `[N, C, H, W]`.
        rows: `[N]`, the row of each image, from 0.
        names: `[R]`, one per row.
        counts: `[R]`, how many images the class has in all.
        title: The picture's title; none by default.

    Returns:
        A figure with one sheet per block of at most 22 rows.
    """
    names = [f"{short(name, 30)} ({count:,})" for name, count in zip(names, counts, strict=True)]
    blocks = -(-len(names) // _MOST_ROWS)
    per_block = -(-len(names) // blocks)
    sheet = _sheet(_thumbnails(images), rows, blocks * per_block)
    columns, height = sheet.shape[1:3]
    width = columns * _CELL + 0.08 * max(map(len, names)) + 0.2
    figure = Figure(figsize=(blocks * width, per_block * _CELL + 0.5), dpi=DPI, layout="compressed")
    for block, axes in enumerate(figure.subplots(1, blocks, squeeze=False)[0]):
        own = slice(block * per_block, (block + 1) * per_block)
        axes.imshow(sheet[own].swapaxes(1, 2).reshape(per_block * height, -1, 3))
        axes.set_yticks([i * height + height / 2 - 1 for i in range(len(names[own]))], names[own])
        axes.set_xticks([])
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
    if title is not None:
        figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def _thumbnails(images: Tensor) -> Pixels:
    """The images as `[N, h, w, 3]`, no side longer than 96."""
    images = images[:, :3] if images.shape[1] > 2 else images.float().mean(1, keepdim=True).expand(-1, 3, -1, -1)
    scale = _THUMBNAIL / max(images.shape[-2:])
    if scale < 1:
        size = [max(1, round(side * scale)) for side in images.shape[-2:]]
        images = torch.nn.functional.interpolate(images.float(), size, mode="area").round()
    pixels: Pixels = images.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return pixels


def _sheet(pixels: Pixels, rows: Tensor, num_rows: int) -> Pixels:
    """`[num_rows, columns, h + 1, w + 1, 3]`: each row's images side by side on white, with a white line after each."""
    height, width = pixels.shape[1:3]
    sheet = np.full((num_rows, int(torch.bincount(rows, minlength=1).max()), height + 1, width + 1, 3), 255, np.uint8)
    for row in set(rows.tolist()):
        own = pixels[(rows == row).numpy()]
        sheet[row, : len(own), :height, :width] = own
    return sheet
