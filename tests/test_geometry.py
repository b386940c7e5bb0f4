import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from etflight import class_code, geometry, largest_cosine, nearest_etf, simplex_etf
from etflight.geometry import simplex_equiangular_tight_frame
from etflight.utils.errors import UserError


def gram_of_simplex(K):
    return (K * torch.eye(K, dtype=torch.float64) - 1) / (K - 1)


sizes = st.integers(2, 24).flatmap(lambda K: st.tuples(st.just(K), st.integers(K - 1, 40)))


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**31 - 1))
def test_simplex_has_unit_rows_equal_angles_and_centre_zero(size, seed):
    K, d = size
    W = simplex_etf(K, d, seed=seed, dtype=torch.float64)
    assert W.shape == (K, d)
    assert_close(W @ W.T, gram_of_simplex(K), rtol=0, atol=1e-12)
    assert_close(W.sum(0), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("K", "d"), [(2, 1), (11, 10), (65, 64), (1000, 999), (1000, 4096)])
def test_extreme_sizes_keep_their_accuracy_in_both_dtypes(K, d):
    W = simplex_etf(K, d, dtype=torch.float64)
    assert_close(W @ W.T, gram_of_simplex(K), rtol=0, atol=1e-12)
    W32 = simplex_etf(K, d)
    assert W32.dtype == torch.float32
    assert_close((W32.double() @ W32.double().T), gram_of_simplex(K), rtol=0, atol=1e-6)


def test_simplex_is_tight_in_the_space_it_spans():
    W = simplex_etf(7, 6, dtype=torch.float64)
    assert_close(W.T @ W, 7 / 6 * torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)


def test_same_seed_same_bits_other_seed_other_frame():
    assert torch.equal(simplex_etf(10, 64, seed=3), simplex_etf(10, 64, seed=3))
    assert (simplex_etf(10, 64, seed=3) - simplex_etf(10, 64, seed=4)).abs().max() > 0.1


def test_rotation_is_haar_so_the_first_coordinate_has_mean_zero():
    first = torch.stack([simplex_etf(2, 3, seed=s, dtype=torch.float64)[0] for s in range(4000)])
    # coordinates of a uniform point of the sphere: mean 0, variance 1/3; five standard errors
    assert first.mean(0).abs().max() < 5 * (1 / 3 / 4000) ** 0.5
    assert_close(first.T @ first / 4000, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=5 * (4 / 45 / 4000) ** 0.5)


def test_too_many_classes_names_sizes_and_both_ways_out():
    with pytest.raises(UserError, match=r"K = 12 .*d = 10 .*projection_dim=11.*code=\"sphere\""):
        simplex_etf(12, 10)


@pytest.mark.parametrize("K", [1, 0, -3])
def test_fewer_than_two_classes_is_an_error(K):
    with pytest.raises(UserError, match="at least two classes"):
        simplex_etf(K, 8)


def test_numpy_frame_is_the_same_frame():
    M = simplex_equiangular_tight_frame(5, 7, seed=2)
    assert isinstance(M, np.ndarray)
    assert M.dtype == np.float64
    for i, j in itertools.product(range(5), range(5)):
        assert M[i] @ M[j] == pytest.approx(1.0 if i == j else -0.25, abs=1e-12)
    np.testing.assert_array_equal(M, simplex_etf(5, 7, seed=2, dtype=torch.float64).numpy())


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 10), st.integers(0, 12), st.integers(0, 10**6))
def test_nearest_etf_beats_every_rotation_and_agrees_with_procrustes(K, extra, seed):
    d = K - 1 + extra
    generator = torch.Generator().manual_seed(seed)
    M = torch.randn(K, d, generator=generator, dtype=torch.float64)
    W, score = nearest_etf(M)
    assert_close(W @ W.T, gram_of_simplex(K), rtol=0, atol=1e-10)
    centred = M - M.mean(0)
    inner = (W * centred).sum()
    # independent oracle: rotate the regular simplex of R^K (standard basis, centred) onto the rows with SciPy
    simplex = np.sqrt(K / (K - 1)) * (np.eye(K) - 1 / K)
    wide = np.pad(centred.numpy(), ((0, 0), (0, max(0, K - d))))
    simplex = np.pad(simplex, ((0, 0), (0, wide.shape[1] - K)))
    _, nuclear = orthogonal_procrustes(simplex, wide)
    assert inner.item() == pytest.approx(nuclear, rel=1e-9)
    assert score.item() == pytest.approx(nuclear / np.linalg.norm(wide) / np.sqrt(K), rel=1e-9)
    assert 0 < score <= 1 + 1e-12
    distance = ((W / W.norm() - centred / centred.norm()) ** 2).sum()
    assert_close(distance, 2 - 2 * score, rtol=0, atol=1e-10)


def test_an_etf_shifted_and_scaled_is_its_own_nearest():
    W = simplex_etf(6, 9, dtype=torch.float64)
    nearest, score = nearest_etf(2.5 * W + torch.arange(9.0).double())
    assert_close(nearest, W, rtol=0, atol=1e-12)
    assert score.item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("M", [torch.randn(5, 3), torch.ones(4, 6), torch.cat([torch.eye(4), torch.eye(4)[:1]])])
def test_nearest_etf_refuses_what_has_no_unique_answer(M):
    with pytest.raises(UserError):
        nearest_etf(M)


@settings(deadline=None, max_examples=60)
@given(st.integers(2, 16).flatmap(lambda d: st.tuples(st.integers(2, 2 * d), st.just(d))), st.integers(0, 1000))
def test_class_code_reaches_rankins_bound(size, seed):
    K, d = size
    W = class_code(K, d, seed=seed, dtype=torch.float64)
    cosines = W @ W.T
    assert_close(cosines.diagonal(), torch.ones(K, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(W.sum(0), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-10)
    largest = (cosines - 2 * torch.eye(K)).max().item()
    if K <= d + 1:
        bound = -1 / (K - 1)
    elif d == 2:
        bound = np.cos(2 * np.pi / K)
    else:
        bound = 0.0
    assert largest == pytest.approx(bound, abs=1e-12)


@pytest.mark.parametrize("K", [3, 5, 12, 100])
def test_class_code_in_the_plane_is_the_regular_polygon(K):
    W = class_code(K, 2, dtype=torch.float64)
    largest = (W @ W.T - 2 * torch.eye(K)).max().item()
    assert largest == pytest.approx(np.cos(2 * np.pi / K), abs=1e-12)


def test_class_code_says_what_it_cannot_do():
    with pytest.raises(UserError, match="K = 3"):
        class_code(3, 1)


# of optimal codes whose centre is zero: square antiprism and the nine points of Schütte and van der Waerden (1951), icosahedron, 24-cell
# (Musin 2008), 600-cell and roots of E8 (Levenshtein 1979)
BEST = {
    (8, 3): (2 * np.sqrt(2) - 1) / 7,
    (9, 3): 1 / 3,
    (12, 3): 1 / np.sqrt(5),
    (24, 4): 1 / 2,
    (120, 4): (1 + np.sqrt(5)) / 4,
    (240, 8): 1 / 2,
}


@pytest.mark.parametrize(("size", "best"), BEST.items(), ids=str)
def test_class_code_finds_the_best_codes_known(size, best):
    W = class_code(*size, dtype=torch.float64)
    assert_close(W.norm(dim=1), torch.ones(size[0], dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(W.sum(0), torch.zeros(size[1], dtype=torch.float64), rtol=0, atol=1e-12)
    largest = (W @ W.T - 2 * torch.eye(size[0])).max().item()
    assert best - 1e-9 < largest < best + 5e-4
    assert largest_cosine(W) == pytest.approx(largest, abs=1e-12)


@pytest.mark.parametrize(("K", "d"), [(7, 3), (50, 10), (150, 20), (170, 80)])
def test_an_optimised_code_is_far_better_than_a_random_one_and_no_better_than_possible(K, d):
    W = class_code(K, d, seed=1, dtype=torch.float64)
    random = torch.nn.functional.normalize(torch.randn(K, d, dtype=torch.float64), dim=1)
    assert 0 <= largest_cosine(W) < 0.75 * largest_cosine(random)  # Rankin: not below 0 for K > d + 1
    assert_close(W.sum(0), torch.zeros(d, dtype=torch.float64), rtol=0, atol=1e-10)
    assert_close(class_code(K, d, seed=1), W.float(), rtol=0, atol=1e-6)


def test_a_code_does_not_depend_on_the_number_of_threads():
    def with_threads(n):
        threads = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            return class_code(200, 40), torch.get_num_threads()
        finally:
            torch.set_num_threads(threads)

    (one, _), (three, left) = with_threads(1), with_threads(3)
    assert torch.equal(one, three)
    assert left == 3


def test_the_descent_follows_the_gradient_of_the_softened_largest_cosine(monkeypatch):
    monkeypatch.setattr(geometry, "_COSINES_AT_ONCE", 40 * 7)  # blocks of 7 rows, the last one smaller
    W = torch.nn.functional.normalize(torch.randn(2, 40, 5, dtype=torch.float64), dim=-1).requires_grad_()
    upper = torch.ones(40, 40).triu(1).bool()
    for temperature in (1.0, 0.1, 0.001):
        objective = (temperature * ((W @ W.mT)[:, upper] / temperature).logsumexp(1)).sum()
        (expected,) = torch.autograd.grad(objective, W)
        assert_close(geometry._gradient(W.detach(), temperature), expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def many():
    return class_code(20_000, 24, seed=3)


def test_a_code_of_very_many_classes_is_random_centred_and_seeded(many):
    assert_close(many.norm(dim=1), torch.ones(20_000), rtol=0, atol=1e-6)
    assert many.double().mean(0).abs().max() < 1e-7
    # uniform on the sphere: the covariance is I/d, up to five standard errors
    assert_close(many.T @ many / 20_000, torch.eye(24) / 24, rtol=0, atol=5 / 24 / 20_000**0.5 * 2**0.5)
    assert torch.equal(class_code(20_000, 24, seed=3), many)
    assert not torch.equal(class_code(20_000, 24, seed=4), many)
    assert_close(class_code(20_000, 24, seed=3, dtype=torch.float64).float(), many, rtol=0, atol=1e-6)


def test_the_largest_cosine_of_some_rows_is_a_lower_bound(many):
    code = many[:3000]
    exact = (code @ code.T - 2 * torch.eye(3000)).max().item()
    assert largest_cosine(code) == pytest.approx(exact, abs=1e-6)
    some = largest_cosine(code, rows=100)
    rows = torch.linspace(0, 2999, 100).round().long()
    assert some <= exact + 1e-6
    assert some == pytest.approx((code[rows] @ code.T).scatter(1, rows[:, None], -2).max().item(), abs=1e-6)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.untyped_storage().nbytes() // 4)
        return result


@pytest.mark.parametrize("work", [lambda W: geometry._gradient(W[None], 0.1), lambda W: largest_cosine(W, rows=500)])
def test_no_tensor_of_all_cosines_is_ever_made(work, monkeypatch, many):
    monkeypatch.setattr(geometry, "_COSINES_AT_ONCE", 2**18)
    W = many[:4000].clone()
    with LargestTensor() as largest:
        work(W)
    assert 2**17 < largest.elements <= 2**18  # all of them would be 2**24


def test_the_largest_cosine_of_a_code_without_a_closed_form_is_logged(caplog):
    with caplog.at_level("INFO", logger="etflight"):
        W = class_code(30, 5)
        class_code(10, 5)
    assert [record.getMessage() for record in caplog.records] == [
        f"30 class vectors in 5 dimensions: largest cosine {largest_cosine(W):.4f}"
    ]


@pytest.mark.parametrize(("frame", "K"), [(simplex_etf, 4), (class_code, 4), (class_code, 12), (class_code, 100)])
def test_a_negative_seed_is_refused(frame, K):
    with pytest.raises(UserError, match="seed of a frame is -1"):
        frame(K, 8, seed=-1)
