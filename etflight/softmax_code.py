"""Codes without a closed form: unit vectors whose largest pairwise cosine is made small by descent, or just random ones."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

_COSINES_AT_ONCE = 2**23
_DRAWN_AT_ONCE = 2**20  # numbers, in float64
_HOTTEST, _COLDEST = 0.3, 0.02  # temperatures, the last one over the square root of the number of steps
_FASTEST, _SLOWEST = 0.3, 0.2  # angles of a step, the last one over the number of steps
_MEAN_DECAY, _POWER_DECAY = 0.9, 0.99  # Adam's, with one power for each vector


def softmax_code(num_vectors: int, dim: int, seed: int) -> Tensor:
    """The best of a few descents on `T log Σ_{i<j} exp(w_i·w_j / T)` over centred unit vectors, while T falls to nearly 0.

    Slow cooling finds the symmetric codes that a quench misses, so small problems get 2,000 steps and up to 64 starts; the number of
    steps falls with the square root of what one costs.

    Args:
        num_vectors: K.
        dim: d >= 2.
        seed: of the starts.

    Returns:
        `[K, d]`, float64; bitwise the same on one machine with any number of threads.

    Source:
        Jiang et al. 2023, arXiv 2310.05351.
    """
    with _one_thread():
        return _descend(num_vectors, dim, seed)


def _descend(num_vectors: int, dim: int, seed: int) -> Tensor:
    cost = num_vectors**2 * (dim + 20) / 1e7
    steps = max(8, round(2000 / math.sqrt(max(1.0, cost))))
    starts = round(min(64.0, max(1.0, 0.2 / cost)))
    W = random_directions(starts * num_vectors, dim, seed, torch.float32).view(starts, num_vectors, dim)
    W = centre(W, rounds=3)
    mean, power = torch.zeros_like(W), W.new_zeros(starts, num_vectors, 1)
    for step in range(steps):
        temperature = _cooled(_HOTTEST, _COLDEST / math.sqrt(steps), step / steps)
        angle = _cooled(_FASTEST, _SLOWEST / steps, step / steps)
        gradient = _gradient(W, temperature)
        gradient -= (gradient * W).sum(dim=-1, keepdim=True) * W
        mean.lerp_(gradient, 1 - _MEAN_DECAY)
        power.lerp_(gradient.square().sum(dim=-1, keepdim=True), 1 - _POWER_DECAY)
        length = (power / (1 - _POWER_DECAY ** (step + 1))).sqrt() + 1e-12
        W = centre(W - angle / (1 - _MEAN_DECAY ** (step + 1)) * mean / length, rounds=1)
    W = centre(W.double(), rounds=50)
    best: Tensor = min(W, key=largest_cosine)
    return best


def random_directions(num_vectors: int, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Seeded random directions `[K, d]`, the same in every dtype, drawn in blocks."""
    generator = np.random.Generator(np.random.PCG64(seed))
    W = torch.empty(num_vectors, dim, dtype=dtype, device="cpu")
    for block in torch.split(W, max(1, _DRAWN_AT_ONCE // dim)):
        block.copy_(torch.from_numpy(generator.standard_normal(block.shape)))
    return W


def centre(W: Tensor, rounds: int) -> Tensor:
    """Unit vectors that sum to zero, in place: each round shrinks the mean about d times, as scaling to norm 1 hardly moves it."""
    for _ in range(rounds):
        W -= W.mean(dim=-2, keepdim=True)
        W /= W.norm(dim=-1, keepdim=True)
    return W


def largest_cosine(code: Tensor, *, rows: int | None = None) -> float:
    """The largest cosine between two rows of a code, in blocks of bounded memory.

    Args:
        code: `[K, d]`, unit rows.
        rows: compare only so many rows, evenly spread, with all others, which gives a lower bound in less time; all by default.

    Returns:
        In [-1, 1], to rounding.

    Example:
        >>> round(largest_cosine(torch.eye(3)[[0, 1, 1]]), 6)
        1.0
    """
    K = len(code)
    chosen = (
        torch.linspace(0, K - 1, K if rows is None else min(rows, K), dtype=torch.float64, device=code.device)
        .round()
        .long()
    )
    largest = -math.inf
    for part in torch.split(chosen, max(1, _COSINES_AT_ONCE // K)):
        cosines = (code[part] @ code.T).scatter_(1, part[:, None], -math.inf)
        largest = max(largest, cosines.max().item())
    return largest


@contextmanager
def _one_thread() -> Iterator[None]:
    """Several would round differently, which the descent amplifies, and on a busy machine wait for each other most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gradient(W: Tensor, temperature: float) -> Tensor:
    """Of `T log Σ_{i<j} exp(w_i·w_j / T)` in each W `[…, K, d]`, from one triangle of cosines, a block of rows at a time.

    The exponentials are relative to the largest cosine so far; when a larger one comes, what was summed before shrinks.
    """
    starts, K, _ = W.shape
    gradient = torch.zeros_like(W)
    total, largest = W.new_zeros(starts, 1, 1), W.new_full((starts, 1, 1), -2.0)
    size = min(max(128, K // 8), max(1, _COSINES_AT_ONCE // K))
    for first in range(0, K, size):
        rows, rest = W[:, first : first + size], W[:, first:]
        cosines = rows @ rest.mT
        counted = rows.shape[1]
        cosines[..., :counted].masked_fill_(W.new_ones(counted, counted, dtype=torch.bool).tril(), -math.inf)
        seen, largest = largest, torch.maximum(largest, cosines.amax(dim=(-2, -1), keepdim=True))
        shrink = ((seen - largest) / temperature).exp()
        pull = cosines.sub_(largest).div_(temperature).exp_()
        total = total * shrink + pull.sum(dim=(-2, -1), keepdim=True)
        gradient *= shrink
        gradient[:, first : first + size] += pull @ rest
        gradient[:, first:] += pull.mT @ rows
    return gradient.div_(total)


def _cooled(first: float, last: float, progress: float) -> float:
    return first * math.pow(last / first, progress)
