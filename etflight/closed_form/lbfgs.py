"""A deterministic minimiser of smooth functions: L-BFGS to a stated gradient norm."""

import math
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from etflight.utils.errors import UserError

_MEMORY = 20  # pairs of steps and changes of the gradient
_SUFFICIENT, _LESS_STEEP = 1e-4, 0.9  # of Wolfe's conditions
_FLAT, _ROUNDING = 0.8, 1e-6  # of the approximate first condition; the second is relative to values in float32
_MOST_TRIALS = 40

Evaluation = tuple[Tensor, Tensor]  # the value, a scalar in float64, and the gradient


def minimise(
    evaluate: Callable[[Tensor], Evaluation],
    start: Tensor,
    is_done: Callable[[Tensor], bool],
    *,
    max_iterations: int = 2000,
) -> Tensor:
    """Find the minimum of a smooth function by L-BFGS with a line search.

    Args:
        evaluate: Computes value and gradient of a point.
        start: The first point, of any shape.
        is_done: Whether a gradient is small enough.
        max_iterations: The most steps.

    Returns:
        The point, of the shape of `start`.

    Raises:
        UserError: The gradient is not small enough after as many steps, or no step makes the value smaller.

    Source:
        Nocedal & Wright, "Numerical Optimization", 2nd edition, algorithms 7.4 and 7.5; the line search by bisection is that of Lewis &
        Overton 2013, section 3, with the approximate condition of Hager & Zhang 2005, equation 4.1.
    """
    point = start.clone()
    value, gradient = evaluate(point)
    pairs: deque[tuple[Tensor, Tensor, Tensor]] = deque(maxlen=_MEMORY)
    for _ in range(max_iterations):
        if is_done(gradient):
            return point
        direction = _direction(gradient, pairs)
        slope = _dot(gradient, direction)
        if not slope < 0:  # rounding: begin again from the gradient
            pairs.clear()
            direction, slope = -gradient, -_dot(gradient, gradient)
        step, (next_value, next_gradient) = _search(evaluate, point, value, direction, slope)
        move, change = step * direction, next_gradient - gradient
        if (curvature := _dot(move, change)) > 0:
            pairs.append((move, change, 1 / curvature))
        point, value, gradient = point + move, next_value, next_gradient
    raise UserError(
        f"no minimum within {max_iterations} steps, the largest gradient is {float(gradient.abs().max()):.3g}: give a larger tolerance "
        "or a larger penalty"
    )


def _direction(gradient: Tensor, pairs: deque[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """The inverse Hessian's estimate times minus the gradient."""
    direction = -gradient
    factors = []
    for move, change, inverse in reversed(pairs):
        factors.append(inverse * _dot(move, direction))
        direction = direction - factors[-1].to(change) * change
    if pairs:
        move, change, inverse = pairs[-1]
        direction = direction * (1 / (inverse * _dot(change, change))).to(direction)
    for (move, change, inverse), factor in zip(pairs, reversed(factors), strict=True):
        direction = direction + (factor - inverse * _dot(change, direction)).to(move) * move
    return direction


def _search(
    evaluate: Callable[[Tensor], Evaluation], point: Tensor, value: Tensor, direction: Tensor, slope: Tensor
) -> tuple[float, Evaluation]:
    """The first step that falls enough and ends less steep, and what is there."""
    step, too_short, too_long = 1.0, 0.0, math.inf
    for _ in range(_MOST_TRIALS):
        there = evaluate(point + step * direction)
        ends = _dot(there[1], direction)
        falls = bool(there[0] <= value + _SUFFICIENT * step * slope)
        # where rounding hides how the value falls, the slope tells
        falls = falls or bool(there[0] <= value + _ROUNDING * value.abs() and ends <= -_FLAT * slope)
        if falls and bool(ends >= _LESS_STEEP * slope):
            return step, there
        if falls:
            too_short = step
        else:
            too_long = step
        step = 2 * step if too_long == math.inf else (too_short + too_long) / 2
    raise UserError(
        f"no step makes the value {float(value):.6g} smaller, with a slope of {float(slope):.3g}: give a larger tolerance, or features in "
        "float64"
    )


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The inner product, a float64 scalar: of rows first, so that float32 rounds sums of a row alone."""
    return (one * other).sum(dim=-1, dtype=torch.float64).sum()
