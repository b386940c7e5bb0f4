"""Frames of class vectors: pure functions on tensors, class vectors in rows `[K, d]` as in `nn.Linear.weight`."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.linalg import block_diag, helmert
from torch import Tensor

from etflight.utils.arrays import evenly
from etflight.utils.errors import UserError
from etflight.utils.precision import in_float64, refuse_not_finite

_MOST_OPTIMISED = 16_384  # classes; with more, a step of the descent would be too slow
_COSINES_AT_ONCE = 2**23
_DRAWN_AT_ONCE = 2**20  # numbers, in float64
_HOTTEST, _COLDEST = 0.3, 0.02  # temperatures; the last one is divided by the square root of the number of steps
_FASTEST, _SLOWEST = 0.3, 0.2  # angles of a step; the last one is divided by the number of steps
_MEAN_DECAY, _POWER_DECAY = 0.9, 0.99  # those of Adam, with one power for each vector
_log = logging.getLogger(__name__)


def simplex_etf(num_classes: int, feature_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    r"""Make the simplex equiangular tight frame: unit rows with pairwise inner product `-1/(K-1)`.

    `W = sqrt(K/(K-1)) Vᵀ Qᵀ` with `V` the Helmert matrix `[K-1, K]` (orthonormal rows, orthogonal to the ones vector) and `Q` a
    Haar-random `[d, K-1]` with orthonormal columns. Unlike the polar form `sqrt(K/(K-1)) (I - 11ᵀ/K) U` this is a
    simplex for every `K <= d + 1`, `K = d + 1` included. It is computed in float64, then cast.

    Args:
        num_classes: The number of classes K >= 2.
        feature_dim: The dimension d >= K - 1.
        seed: The seed of the rotation Q; the same seed gives bitwise the same frame on one machine.
        dtype: The dtype of the result; inner products are exact to 1e-12 in float64 and 1e-6 in float32.

    Returns:
        `[K, d]`, rows of norm 1 that sum to zero.

    Raises:
        UserError: There are fewer than two classes or more than d + 1, or the seed is negative.

    Source:
        Papyan, Han & Donoho 2020, Definition 1 (the frame); Yang et al. 2022, arXiv 2203.09081, equation 1 (as classifier).

    Example:
        >>> W = simplex_etf(4, 3, dtype=torch.float64)
        >>> torch.allclose(W @ W.T, (4 * torch.eye(4) - 1).double() / 3)
        True
    """
    _check_sizes(num_classes, feature_dim)
    if num_classes > feature_dim + 1:
        raise UserError(
            f"no simplex ETF of K = {num_classes} class vectors exists in d = {feature_dim} dimensions (K <= d + 1 is needed): "
            f'give the head projection_dim={num_classes - 1} or more (a non-linear projection), or code="sphere"'
        )
    frame = _regular_simplex(num_classes) @ _haar(feature_dim, num_classes - 1, seed).T
    return torch.from_numpy(frame).to(dtype)


def simplex_equiangular_tight_frame(k: int, d: int, seed: int = 0) -> np.ndarray:
    """Make the simplex ETF as a NumPy array: `M[i] @ M[j]` is 1 for `i == j` and `-1/(k-1)` otherwise.

    Args:
        k: The number of vectors, at least 2 and at most `d + 1`.
        d: The dimension of the vectors.
        seed: The seed of the rotation.

    Returns:
        `[k, d]`, float64.

    Raises:
        UserError: There are fewer than two vectors or more than d + 1, or the seed is negative.

    Example:
        >>> M = simplex_equiangular_tight_frame(5, 8)
        >>> M.shape
        (5, 8)
        >>> bool(abs(M[0] @ M[0] - 1) < 1e-12 and abs(M[0] @ M[1] + 1 / 4) < 1e-12)
        True
    """
    frame: np.ndarray = simplex_etf(k, d, seed=seed, dtype=torch.float64).numpy()
    return frame


def orthant_code(num_classes: int, dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make orthonormal rows without negative entries, which features after a ReLU can reach.

    Each dimension belongs to one class, chosen at random; the numbers of dimensions of two classes differ by one at most. A class vector
    has the same entry in all of its dimensions.

    Args:
        num_classes: The number of classes K >= 2.
        dim: The dimension d >= K.
        seed: The seed of the choice of dimensions.
        dtype: The dtype of the result.

    Returns:
        `[K, d]`, rows of norm 1 with inner products 0; centred, they are a simplex ETF.

    Raises:
        UserError: There are fewer than two classes or more than d, or the seed is negative.

    Source:
        Kim & Kim, "Fixed Non-negative Orthogonal Classifier", ICLR 2024.

    Example:
        >>> orthant_code(2, 2).sum().item()
        2.0
    """
    _check_sizes(num_classes, dim)
    if num_classes > dim:
        raise UserError(
            f"no {num_classes} orthogonal class vectors exist in {dim} dimensions: give the head projection_dim={num_classes} or more, "
            'or code="simplex"'
        )
    _check_seed(seed)
    code = np.zeros((num_classes, dim))
    for row, own in zip(code, np.array_split(np.random.default_rng(seed).permutation(dim), num_classes), strict=True):
        row[own] = 1 / math.sqrt(len(own))
    return torch.from_numpy(code).to(dtype)


def nearest_etf(M: Tensor) -> tuple[Tensor, Tensor]:
    r"""Compute the simplex ETF closest to the rows of `M`, in closed form.

    With `V` the Helmert matrix and the polar decomposition `V M = U S Zᵀ`, the frame `sqrt(K/(K-1)) Vᵀ U Zᵀ` maximises the inner
    product with the centred rows `M_c` over all simplex ETFs (orthogonal Procrustes), and
    `score = ‖M_c‖_* / (sqrt(K-1) ‖M_c‖_F)`.

    Args:
        M: Class means or class vectors `[K, d]`, any float dtype; adding one vector to every row does not change the result.

    Returns:
        The frame `[K, d]` of unit rows and the score, a scalar in [0, 1] that is 1 exactly if the centred rows are a multiple of
        a simplex ETF. The squared Frobenius distance between the two, each scaled to norm 1, is `2 - 2 score`.

    Raises:
        UserError: K > d + 1, or the centred rows have a rank below K - 1, so that the closest frame is not unique; or a number is
            not finite.

    Source:
        Schönemann 1966, "A generalized solution of the orthogonal Procrustes problem".
    """
    K, d = M.shape
    _check_sizes(K, d)
    if K > d + 1:
        raise UserError(
            f"no simplex ETF of K = {K} rows exists in d = {d} dimensions, so none is nearest: K <= d + 1 is needed"
        )
    if not bool(M.isfinite().all()):
        raise UserError("the rows hold NaN or infinite numbers: leave out classes without samples")
    rows = in_float64(M.detach())
    V = torch.from_numpy(helmert(K)).to(rows.device)
    U, S, Zh = torch.linalg.svd(V @ rows, full_matrices=False)
    if not bool(
        S[-1] > rows.norm() * max(K, d) * torch.finfo(S.dtype).eps
    ):  # the rounding of the rows before they are centred
        raise UserError(
            f"the {K} centred rows have rank below K - 1 = {K - 1}: the nearest simplex ETF is not unique "
            "(are two rows equal, or a class without samples?)"
        )
    frame = math.sqrt(K / (K - 1)) * V.T @ U @ Zh
    score = S.sum() / (math.sqrt(K - 1) * S.norm())
    return frame.to(M), score.to(M)


def class_code(num_classes: int, feature_dim: int, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make the best known code of unit class vectors, whose largest pairwise cosine is as small as possible.

    - `K <= d + 1`: the simplex, all cosines `-1/(K-1)`.
    - `d + 1 < K <= 2d`: `m = K - d` mutually orthogonal simplices of near-equal size; the largest cosine is 0, which no
      code of so many vectors can undercut (Rankin 1955). `K = 2d` is the orthoplex.
    - `d = 2`: the regular polygon, largest cosine `cos(2π/K)`.
    - other `K <= 16,384`: a softmax code, found by minimising `T log Σ_{i<j} exp(w_i·w_j / T)` while T falls, the best of up to
      64 random starts; larger codes get fewer and shorter starts. On one core it takes about a second for small codes, 5 at K = 1000 and
      d = 128, and 60 to 120 at K = 16,384 and d from 64 to 512. If an optimal centred code is known (icosahedron, 24-cell, roots
      of E8, …), the tests find its largest cosine to 5e-4; otherwise it is a local optimum.
    - larger K: random directions, whose largest cosine is about `2 sqrt(log(K) / d)`.

    Rows always sum to zero. Beyond the result, the descent needs a few times its memory and blocks of 2^23 cosines, and random directions
    need 8 MB. The same seed gives bitwise the same code on one machine; on another machine rounding, which the descent amplifies, may lead
    to another code that is as good. The largest cosine of the last two kinds is logged at level INFO, from 1,024 vectors
    if there are more; `largest_cosine` computes it from all.

    Args:
        num_classes: The number of classes K >= 2.
        feature_dim: The dimension d >= 1.
        seed: The seed of the rotation (Haar), or of the random starts.
        dtype: The dtype of the result.

    Returns:
        `[K, d]`, unit rows.

    Raises:
        UserError: There are fewer than two classes, d = 1 with K > 2, or the seed is negative.

    Source:
        Jiang et al. 2023, arXiv 2310.05351 (softmax codes).

    Example:
        >>> from etflight import largest_cosine
        >>> icosahedron = class_code(12, 3)
        >>> round(largest_cosine(icosahedron), 3)
        0.447
    """
    _check_sizes(num_classes, feature_dim)
    if num_classes <= feature_dim + 1:
        return simplex_etf(num_classes, feature_dim, seed=seed, dtype=dtype)
    if feature_dim == 1:
        raise UserError(
            f"K = {num_classes} distinct unit vectors do not exist in d = 1 dimension: give the head projection_dim=2 or more"
        )
    if feature_dim == 2:
        angles = 2 * math.pi * np.arange(num_classes) / num_classes
        exact = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        return torch.from_numpy(exact @ _haar(2, 2, seed)).to(dtype)
    if num_classes <= 2 * feature_dim:
        exact = _orthogonal_simplices(num_classes, feature_dim)
        return torch.from_numpy(exact @ _haar(feature_dim, feature_dim, seed)).to(dtype)
    _check_seed(seed)
    if num_classes <= _MOST_OPTIMISED:
        with _one_thread():
            code = _softmax_code(num_classes, feature_dim, seed).to(dtype)
    else:
        code = _centre(_random_directions(num_classes, feature_dim, seed, dtype), rounds=12)
    if _log.isEnabledFor(logging.INFO):
        largest = largest_cosine(code, rows=1024)
        _log.info(f"{num_classes} class vectors in {feature_dim} dimensions: largest cosine {largest:.4f}")
    return code


def _orthogonal_simplices(num_classes: int, feature_dim: int) -> np.ndarray:
    """Make `K - d` simplices of near-equal size in orthogonal subspaces; a simplex of s vectors fills s - 1 dimensions."""
    parts = np.array_split(np.arange(num_classes), num_classes - feature_dim)
    code: np.ndarray = block_diag(*(_regular_simplex(len(part)) for part in parts))
    return code


def _regular_simplex(size: int) -> np.ndarray:
    """Make `[s, s - 1]`, unit rows with pairwise inner product `-1/(s-1)`."""
    simplex: np.ndarray = math.sqrt(size / (size - 1)) * helmert(size).T
    return simplex


def _haar(rows: int, columns: int, seed: int) -> np.ndarray:
    """Draw a Haar-random matrix with orthonormal columns; without the signs of R, QR's convention would bias it."""
    _check_seed(seed)
    gaussian = np.random.Generator(np.random.PCG64(seed)).standard_normal((rows, columns))
    Q, R = np.linalg.qr(gaussian)
    orthonormal: np.ndarray = Q * np.sign(np.diag(R))
    return orthonormal


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise UserError(f"the seed of a frame is {seed}: give 0 or more")


def _check_sizes(num_classes: int, feature_dim: int) -> None:
    if num_classes < 2:
        raise UserError(f"a classifier needs at least two classes, got K = {num_classes}")
    if feature_dim < 1:
        raise UserError(f"feature_dim must be at least 1, got {feature_dim}")


def _softmax_code(num_vectors: int, dim: int, seed: int) -> Tensor:
    """Find the best of a few descents on `T log Σ_{i<j} exp(w_i·w_j / T)` over centred unit vectors, as T falls to nearly 0; float64.

    Slow cooling finds the symmetric codes that fast cooling misses, so small problems get 2,000 steps and up to 64 starts; the number of
    steps falls with the square root of the cost of a step.
    """
    cost = num_vectors**2 * (dim + 20) / 1e7
    steps = max(8, round(2000 / math.sqrt(max(1.0, cost))))
    starts = round(min(64.0, max(1.0, 0.2 / cost)))
    W = _random_directions(starts * num_vectors, dim, seed, torch.float32).view(starts, num_vectors, dim)
    W = _centre(W, rounds=3)
    mean, power = torch.zeros_like(W), W.new_zeros(starts, num_vectors, 1)
    for step in range(steps):
        temperature = _geometric_schedule(_HOTTEST, _COLDEST / math.sqrt(steps), step / steps)
        angle = _geometric_schedule(_FASTEST, _SLOWEST / steps, step / steps)
        gradient = _gradient(W, temperature)
        gradient -= (gradient * W).sum(dim=-1, keepdim=True) * W
        mean.lerp_(gradient, 1 - _MEAN_DECAY)
        power.lerp_(gradient.square().sum(dim=-1, keepdim=True), 1 - _POWER_DECAY)
        length = (power / (1 - _POWER_DECAY ** (step + 1))).sqrt() + 1e-12
        W = _centre(W - angle / (1 - _MEAN_DECAY ** (step + 1)) * mean / length, rounds=1)
    W = _centre(W.double(), rounds=50)
    best: Tensor = min(W, key=largest_cosine)
    return best


def _random_directions(num_vectors: int, dim: int, seed: int, dtype: torch.dtype) -> Tensor:
    """Draw seeded random directions `[K, d]` in blocks, the same in every dtype."""
    generator = np.random.Generator(np.random.PCG64(seed))
    W = torch.empty(num_vectors, dim, dtype=dtype, device="cpu")
    for block in torch.split(W, max(1, _DRAWN_AT_ONCE // dim)):
        block.copy_(torch.from_numpy(generator.standard_normal(block.shape)))
    return W


def _centre(W: Tensor, rounds: int) -> Tensor:
    """Make unit vectors sum to zero, in place.

    Each round shrinks the mean about d times, because scaling to norm 1 hardly moves it.
    """
    for _ in range(rounds):
        W -= W.mean(dim=-2, keepdim=True)
        W /= W.norm(dim=-1, keepdim=True)
    return W


def largest_cosine(code: Tensor, *, rows: int | None = None) -> float:
    """Compute the largest cosine between two rows of a code, in blocks of bounded memory.

    Args:
        code: The code `[K, d]`, unit rows.
        rows: The number of rows, evenly spread, that are compared with all others; fewer than K give a lower bound in less time. All by
            default.

    Returns:
        The cosine, in [-1, 1] up to rounding.

    Raises:
        UserError: A vector is not finite.

    Example:
        >>> round(largest_cosine(torch.eye(3)[[0, 1, 1]]), 6)
        1.0
    """
    K = len(code)
    refuse_not_finite("vectors of the code", code)
    chosen = torch.from_numpy(evenly(K, rows or K)).to(code.device)
    largest = -math.inf
    for part in torch.split(chosen, max(1, _COSINES_AT_ONCE // K)):
        cosines = (code[part] @ code.T).scatter_(1, part[:, None], -math.inf)
        largest = max(largest, cosines.max().item())
    return largest


@contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread within the block.

    Several threads would round differently, which the descent amplifies, and on a busy machine mostly wait for each other.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _gradient(W: Tensor, temperature: float) -> Tensor:
    """The gradient of `T log Σ_{i<j} exp(w_i·w_j / T)` in each W `[…, K, d]`, from one triangle of cosines, a block of rows at a time.

    The exponentials are relative to the largest cosine so far; if a larger one comes, the earlier sums are scaled down.
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


def _geometric_schedule(first: float, last: float, progress: float) -> float:
    return first * math.pow(last / first, progress)
