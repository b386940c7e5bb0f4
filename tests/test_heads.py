"""Heads, in float64, float32 and half precision."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from etflight import CosineHead, DotRegressionLoss, ETFHead, Head, LinearHead, ScaledLinearHead, simplex_etf
from etflight.checkpoint.weights_to_come import weights_come_next
from etflight.embedder import Rotation
from etflight.utils.errors import UserError
from tests.tensors import LargestTensor

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(32, 16, generator=GENERATOR)
TARGET = torch.arange(32) % 10
ROWS = torch.arange(32)


# --- logits ------------------------------------------------------------------------------------------------------------


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


HEADS = {  # the head, and its logits of features in NumPy, where W are its class vectors and b its bias
    "frame": (partial(ETFHead, batch_norm=False, scale=3.0), lambda h, W, b: 3.0 * unit(h) @ W.T),
    "frame without norm": (partial(ETFHead, batch_norm=False, normalize=False), lambda h, W, b: h @ W.T),
    "cosine": (CosineHead, lambda h, W, b: 16.0 * unit(h) @ unit(W).T),
    "linear": (LinearHead, lambda h, W, b: h @ W.T + b),
    "linear without bias": (partial(LinearHead, use_bias=False), lambda h, W, b: h @ W.T),
    "linear, normalised": (partial(LinearHead, normalize=True), lambda h, W, b: unit(h) @ W.T + b),
    "scaled": (ScaledLinearHead, lambda h, W, b: h @ W.T + b),
}


def array(values):
    return None if values is None else values.detach().double().numpy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_those_of_numpy_and_cosines_exact_in_half_precision_too(kind, dtype):
    make, oracle = HEADS[kind]
    head, features = make(16, 10).to(dtype), FEATURES.to(dtype)
    if kind == "scaled":
        nn.init.uniform_(head.class_scale, -1, 2)
    logits = head(features)
    assert (head.num_classes, head.in_features, head.weight.shape) == (10, 16, (10, 16))
    assert head.bias is None or head.bias.shape == (10,)
    exact = ("linear" not in kind and kind != "scaled") or "normalised" in kind
    assert logits.dtype == (torch.promote_types(dtype, torch.float32) if exact else dtype)
    expected = oracle(array(features), array(head.weight), array(head.bias))
    if isinstance(head, ETFHead | CosineHead) and dtype == torch.float32:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(head(features), logits, rtol=0, atol=1e-6)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-5 if exact else 0.05)
    np.testing.assert_allclose(array(logits), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("code", ["simplex", "orthant", "sphere"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_target_logits_are_the_targets_column_of_the_logits(code, dtype, autocast):
    head = turned(ETFHead(16, 10, code=code, scale=3.0, learn_rotation=True)).to(dtype).eval()
    features = FEATURES.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, own = head(features), head.target_logits(head.embed(features), TARGET)
    assert logits.dtype == own.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(own, logits[ROWS, TARGET])


def test_target_logits_make_nothing_larger_than_the_features_backward_included():
    head = ETFHead(64, 60)
    features, target = torch.randn(8, 64, requires_grad=True), torch.arange(8)
    with LargestTensor() as all_classes:
        DotRegressionLoss()(head(features), target).backward()
    assert all_classes.nbytes >= 4 * 8 * 60
    with LargestTensor() as own_class:
        DotRegressionLoss().from_target_logits(head.target_logits(head.embed(features), target), target).backward()
    assert own_class.nbytes == features.nbytes
    for no_class in (-1, 60):
        with pytest.raises(IndexError):
            head.target_logits(head.embed(features), torch.full((8,), no_class))


def test_baselines_can_take_the_embedding_of_the_etf_head_which_reaches_negative_cosines():
    positive = FEATURES.relu()
    normed = ETFHead(16, 10).embed(positive)
    assert (normed @ normed.T).min() < -0.2
    plain = ETFHead(16, 10, batch_norm=False).embed(positive)
    assert (plain @ plain.T).min() >= 0
    linear = LinearHead(16, 10, batch_norm=True, normalize=True)
    for head in (linear, CosineHead(16, 10, batch_norm=True)):
        assert_close(head.embed(positive), normed)


# --- the frame ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reserved", [0, 4])
def test_the_frame_is_saved_but_never_trained(reserved):
    head = ETFHead(16, 10 - reserved, seed=5, reserved_classes=reserved)
    frame = simplex_etf(10, 16, seed=5)
    head(FEATURES).square().sum().backward()
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    assert torch.equal(head.frame, frame)
    assert not head.frame.requires_grad
    other = ETFHead(16, 10 - reserved, seed=2, reserved_classes=reserved)
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.frame, frame)


def test_a_frame_moves_with_its_head_but_is_never_of_half_precision():
    frame = ETFHead(16, 7).weight
    assert torch.equal(ETFHead(16, 7).half().weight, frame)
    assert torch.equal(ETFHead(16, 6, reserved_classes=1).to(torch.bfloat16).frame, frame)
    assert ETFHead(16, 7).double().weight.dtype == torch.float64
    assert ETFHead(16, 7).to("meta", torch.bfloat16).weight.device.type == "meta"


def test_a_sphere_code_is_not_computed_where_a_state_dict_brings_it():
    trained = ETFHead(5, 20, code="sphere")
    cosines = trained.weight @ trained.weight.T - 2 * torch.eye(20)
    assert cosines.max() < 0.6
    with weights_come_next():
        loaded, simplex = ETFHead(5, 20, code="sphere"), ETFHead(16, 10)
    assert loaded.weight.isnan().all()
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded.weight, trained.weight)
    assert torch.equal(simplex.weight, ETFHead(16, 10).weight)


# --- classes to come ------------------------------------------------------------------------------------------------------


def test_reserved_classes_are_the_rest_of_one_frame_and_become_classes_without_any_other_change():
    head = ETFHead(16, 6, reserved_classes=4, seed=3).train()
    assert_close(head.frame, simplex_etf(10, 16, seed=3))
    head(FEATURES)  # its BatchNorm has seen something
    head.eval()
    larger = head.extended(8).eval()
    logits = larger(FEATURES)
    assert logits.shape == (32, 8)
    assert_close(logits[:, :6], head(FEATURES))
    assert_close(logits, larger.embed(FEATURES) @ simplex_etf(10, 16, seed=3)[:8].T)
    assert larger.extended(10).reserved is None
    assert head.num_classes == 6


@pytest.mark.parametrize("num_classes", [5, 11])
def test_more_classes_than_the_frame_has_or_fewer_than_now_are_refused(num_classes):
    with pytest.raises(UserError, match=f"{num_classes} classes.* has 6 .* 10 vectors"):
        ETFHead(16, 6, reserved_classes=4).extended(num_classes)


@pytest.mark.parametrize(
    ("projection_dim", "asked", "linear"), [(9, False, True), (16, False, True), (40, False, False), (40, True, True)]
)
def test_projection_is_linear_up_to_the_features_width_and_above_if_asked(projection_dim, asked, linear):
    head = ETFHead(16, 10, projection_dim=projection_dim, linear_projection=asked)
    assert head.weight.shape == (10, projection_dim)
    assert isinstance(head.embedder.projection, nn.Linear) is linear
    features = torch.randn(200, 4, generator=GENERATOR) @ torch.randn(4, 16, generator=GENERATOR)
    projected = head.embedder.projection(features)
    assert (torch.linalg.matrix_rank(projected - projected.mean(0), rtol=1e-4) > 4) is not linear


# --- what may be learned -----------------------------------------------------------------------------------------------


def turned(head):
    """The head, with a rotation that is far from the identity."""
    nn.init.normal_(head.embedder.rotation.generator, generator=torch.Generator().manual_seed(3))
    return head


@pytest.mark.parametrize("loss", [DotRegressionLoss(), nn.functional.cross_entropy], ids=["dot_regression", "ce"])
def test_the_frame_that_features_meet_turns_in_training_and_stays_a_simplex(loss):
    head = ETFHead(16, 10, learn_rotation=True)
    assert_close(head(FEATURES), ETFHead(16, 10)(FEATURES))  # the identity at first
    optimizer = torch.optim.SGD([head.embedder.rotation.generator], lr=2.0, momentum=0.9, weight_decay=2e-4)
    losses = []
    for _ in range(100):  # features that do not move: only the rotation can help
        optimizer.zero_grad()
        losses.append(loss(head(FEATURES), TARGET))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    frame = head.weight @ head.embedder.rotation.matrix()  # <w, R h> = <Rᵀ w, h>
    assert (frame - head.weight).norm() > 0.1
    assert_close(frame @ frame.T, torch.full((10, 10), -1 / 9).fill_diagonal_(1), rtol=0, atol=1e-5)
    assert_close(head(FEATURES), ETFHead(16, 10).embed(FEATURES) @ frame.T, rtol=0, atol=1e-5)
    assert torch.equal(head.weight, ETFHead(16, 10).weight)


@pytest.mark.parametrize("step", [0.1, 1.0, 100.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_a_rotation_is_orthogonal_wherever_an_optimizer_takes_it(step, dtype, tolerance):
    rotation = Rotation(24).to(dtype)
    nn.init.normal_(rotation.generator, std=step, generator=torch.Generator().manual_seed(0))
    R = rotation.matrix()
    # (I - S)⁻¹ costs as many digits as S is large
    assert_close(R @ R.T, torch.eye(24, dtype=dtype), rtol=0, atol=tolerance * max(1, step))
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-3)


def test_any_rotation_can_be_reached_by_the_inverse_of_cayleys_transform():
    Q, _ = torch.linalg.qr(torch.randn(6, 6, generator=GENERATOR, dtype=torch.float64))
    Q[:, 0] *= torch.linalg.det(Q).sign()
    one = torch.eye(6, dtype=torch.float64)
    rotation = Rotation(6).double()
    with torch.no_grad():
        rotation.generator.copy_((Q - one) @ torch.linalg.inv(Q + one))
    assert_close(rotation.matrix(), Q, rtol=0, atol=1e-10)


def test_a_learned_scale_is_a_parameter_that_stays_positive_and_is_loaded_as_it_was_saved():
    head = turned(ETFHead(16, 10, scale=4.0, learn_scale=True, learn_rotation=True))
    assert head.scale.item() == pytest.approx(4.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    for _ in range(5):
        head(FEATURES).pow(2).mean().backward()
        optimizer.step()
    assert 0 < head.scale.item() != pytest.approx(4.0)
    loaded = ETFHead(16, 10, seed=2, learn_scale=True, learn_rotation=True)
    loaded.load_state_dict(head.state_dict())
    assert torch.equal(loaded.eval()(FEATURES), head.eval()(FEATURES))


def test_linear_heads_start_as_torchs_linear_layer():
    for make in (LinearHead, ScaledLinearHead):
        torch.manual_seed(1)
        head = make(16, 10)
        torch.manual_seed(1)
        assert_close(head(FEATURES), nn.Linear(16, 10)(FEATURES), rtol=0, atol=0)


def test_a_frozen_linear_head_trains_its_batch_norm_only():
    head = LinearHead(16, 10, batch_norm=True, frozen=True)
    assert [name for name, p in head.named_parameters() if p.requires_grad] == [
        "embedder.batch_norm.weight",
        "embedder.batch_norm.bias",
    ]
    assert all(p.requires_grad for p in LinearHead(16, 10).parameters())


@pytest.mark.parametrize(
    ("make", "name", "values"),
    [
        (ETFHead, "scale", [0.0, -1.0, math.nan, math.inf]),
        (CosineHead, "scale", [0.0, -1.0, math.nan, math.inf]),
        (ETFHead, "projection_dim", [0, -1, 1, 10**30]),
        (ETFHead, "seed", [-1]),
        (ETFHead, "code", ["cube"]),
        (ETFHead, "reserved_classes", [-1]),
        (ETFHead, "linear_projection", [True]),  # of no projection
        (
            partial(ETFHead, reserved_classes=8, projection_dim=40),
            "linear_projection",
            [True],
        ),  # 18 classes in 16 dimensions
    ],
)
def test_a_bad_argument_is_named(make, name, values):
    for value in values:
        with pytest.raises(UserError, match=name):
            make(16, 10, **{name: value})
    with pytest.raises(UserError, match="at least two classes"):
        make(16, 1)


@pytest.mark.parametrize("method", ["embed", "forward"])
def test_a_head_that_overrides_what_hooks_and_losses_rely_on_is_refused_with_the_way_out(method):
    head = type("Mine", (LinearHead,), {method: lambda self, features: features})
    with pytest.raises(UserError, match=r"Mine: .*embedder"):
        head(16, 10)


def test_products_of_any_class_vectors_scale_and_bias_are_the_logits_that_a_head_need_not_compute_itself():
    class Plain(Head):
        def __init__(self, in_features, num_classes):
            super().__init__(in_features, num_classes, embedder=nn.Linear(in_features, 6), scale=2.0)
            self.weight = nn.Parameter(torch.randn(num_classes, 6))
            self.bias = nn.Parameter(torch.randn(num_classes))

    head = Plain(16, 10)
    embedding = array(FEATURES) @ array(head.embedder.weight).T + array(head.embedder.bias)
    expected = 2.0 * embedding @ array(head.weight).T + array(head.bias)
    np.testing.assert_allclose(array(head(FEATURES)), expected, atol=1e-5)
    np.testing.assert_allclose(
        array(head.target_logits(head.embed(FEATURES), TARGET)), expected[ROWS, TARGET], atol=1e-5
    )
