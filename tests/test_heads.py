import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from etflight import CosineHead, DotRegressionLoss, ETFHead, LinearHead, ScaledLinearHead, simplex_etf
from etflight.heads import Rotation, codes_from_state_dict
from etflight.utils.errors import UserError

torch.manual_seed(0)
FEATURES = torch.randn(32, 16)


@pytest.mark.parametrize(
    "head",
    [
        ETFHead(16, 10),
        ETFHead(16, 10, learn_rotation=True),
        LinearHead(16, 10),
        CosineHead(16, 10),
        ScaledLinearHead(16, 10),
    ],
    ids=lambda h: type(h).__name__,
)
def test_heads_obey_one_contract(head):
    logits = head(FEATURES)
    assert logits.shape == (32, 10)
    assert head.embed(FEATURES).shape == (32, head.weight.shape[1])
    assert (head.num_classes, head.in_features, len(head.weight)) == (10, 16, 10)
    assert head.bias is None or head.bias.shape == (10,)


def test_the_frame_is_saved_but_never_trained():
    head = ETFHead(16, 10, seed=5)
    assert "weight" in head.state_dict()
    assert "weight" not in dict(head.named_parameters())
    assert not head.weight.requires_grad
    assert torch.equal(head.weight, simplex_etf(10, 16, seed=5))
    before = head.weight.clone()
    head(FEATURES).square().sum().backward()
    torch.optim.SGD(head.parameters(), lr=1.0).step()
    assert torch.equal(head.weight, before)


def test_a_loaded_head_has_the_frame_it_was_saved_with():
    trained, other = ETFHead(16, 10, seed=1), ETFHead(16, 10, seed=2)
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other.weight, trained.weight)


def test_logits_are_scaled_cosines():
    head = ETFHead(16, 10, scale=8.0).eval()
    h = head.embed(FEATURES)
    assert_close(h.norm(dim=1), torch.ones(32))
    assert_close(
        head(FEATURES), 8 * nn.functional.cosine_similarity(h[:, None], head.weight[None], dim=2), rtol=0, atol=1e-5
    )


def test_target_logits_are_the_targets_column_of_the_logits():
    head = ETFHead(16, 10, scale=3.0).eval()
    target = torch.arange(32) % 10
    assert_close(head.target_logits(FEATURES, target), head(FEATURES)[torch.arange(32), target])


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes, those of the backward included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("autocast", [False, True])
def test_target_logits_make_nothing_larger_than_the_features_backward_included(autocast):
    head = ETFHead(64, 60)
    features, target = torch.randn(8, 64, requires_grad=True), torch.arange(8)
    with Largest() as all_classes:
        DotRegressionLoss()(head(features), target).backward()
    assert all_classes.elements >= 8 * 60
    with Largest() as own_class, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z = head.target_logits(features, target)
        DotRegressionLoss().from_target_logits(z, target).backward()
    assert z.dtype == torch.float32
    assert own_class.elements == features.numel()
    assert head.weight.grad is None


def test_a_target_that_is_no_class_is_an_error_and_never_another_class():
    for target in (-1, 10):
        with pytest.raises(IndexError):
            ETFHead(16, 10).target_logits(FEATURES, torch.full((32,), target))


def test_a_model_in_bfloat16_still_multiplies_in_float32():
    head = ETFHead(16, 10).bfloat16()
    z, target = head(FEATURES.bfloat16()), torch.arange(32) % 10
    assert z.dtype == torch.float32
    assert_close(head.target_logits(FEATURES.bfloat16(), target), z[torch.arange(32), target])


def test_without_batch_norm_features_after_relu_cannot_reach_negative_cosines_with_it_they_can():
    positive = FEATURES.relu()
    plain = ETFHead(16, 10, batch_norm=False).embed(positive)
    assert (plain @ plain.T).min() >= 0
    normed = ETFHead(16, 10).embed(positive)
    assert (normed @ normed.T).min() < -0.2


def test_cosines_near_one_keep_their_gradient_under_bfloat16_autocast():
    head = ETFHead(16, 10, batch_norm=False)
    w = head.weight[0]
    other = head.weight[1] - (head.weight[1] @ w) * w
    h = (0.9985 * w + (1 - 0.9985**2) ** 0.5 * other / other.norm())[None].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(h)[0, 0]
        loss = (z - 1) ** 2 / 2
    assert z.dtype == torch.float32
    assert z.item() == pytest.approx(0.9985, abs=1e-5)
    loss.backward()
    assert h.grad.norm() > 1e-5


def test_a_learned_scale_is_a_parameter_that_stays_positive():
    head = ETFHead(16, 10, scale=4.0, learn_scale=True)
    assert head.scale.item() == pytest.approx(4.0)
    optimizer = torch.optim.SGD(head.parameters(), lr=10.0)
    for _ in range(5):
        head(FEATURES).pow(2).mean().backward()
        optimizer.step()
    assert 0 < head.scale.item() != pytest.approx(4.0)


def simplex_gram(K):
    return torch.full((K, K), -1 / (K - 1)).fill_diagonal_(1)


def turned(head, step=1.0):
    """The head, with a rotation that is far from the identity."""
    with torch.no_grad():
        head.rotation.generator.normal_(0, step, generator=torch.Generator().manual_seed(3))
    return head


def test_a_rotation_starts_as_the_identity():
    assert_close(ETFHead(16, 10, learn_rotation=True)(FEATURES), ETFHead(16, 10)(FEATURES))


@pytest.mark.parametrize("loss", [DotRegressionLoss(), nn.functional.cross_entropy], ids=["dot_regression", "ce"])
def test_the_frame_that_features_meet_turns_in_training_and_stays_a_simplex(loss):
    head = ETFHead(16, 10, learn_rotation=True)
    h, target = FEATURES.clone(), torch.arange(32) % 10  # features that do not move: only the rotation can help
    optimizer = torch.optim.SGD([head.rotation.generator], lr=2.0, momentum=0.9, weight_decay=2e-4)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(loss(head(h), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    frame = head.weight @ head.rotation.matrix()  # <w, R h> = <Rᵀ w, h>
    assert (frame - head.weight).norm() > 0.1
    assert_close(frame @ frame.T, simplex_gram(10), rtol=0, atol=1e-5)
    assert torch.equal(head.weight, ETFHead(16, 10).weight)


@pytest.mark.parametrize("step", [0.1, 1.0, 100.0])
def test_a_rotation_is_orthogonal_wherever_an_optimizer_takes_it(step):
    rotation = Rotation(24)
    nn.init.normal_(rotation.generator, std=step)
    R = rotation.matrix()
    assert_close(R @ R.T, torch.eye(24), rtol=0, atol=1e-5)
    assert torch.linalg.det(R).item() == pytest.approx(1, abs=1e-4)
    assert_close(rotation(FEATURES[:, :16].repeat(1, 2)[:, :24]).norm(dim=1), FEATURES.repeat(1, 2)[:, :24].norm(dim=1))


def test_any_rotation_can_be_reached_by_the_inverse_of_cayleys_transform():
    generator = torch.Generator().manual_seed(4)
    Q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    Q[:, 0] *= torch.linalg.det(Q).sign()
    one = torch.eye(6, dtype=torch.float64)
    rotation = Rotation(6)
    with torch.no_grad():
        rotation.generator.copy_((Q - one) @ torch.linalg.inv(Q + one))
    assert_close(rotation.matrix(), Q.float(), rtol=0, atol=1e-4)


def test_the_gradient_of_a_rotation_is_that_of_finite_differences():
    rotation = Rotation(5)
    torch.manual_seed(0)
    h = torch.randn(3, 5)

    def turn(A):
        return torch.func.functional_call(rotation, {"generator": A}, (h,)).sin().sum()

    A, direction = torch.randn(5, 5, requires_grad=True), torch.randn(5, 5)
    (gradient,) = torch.autograd.grad(turn(A), A)
    step = 1e-2
    slope = (turn(A + step * direction) - turn(A - step * direction)) / (2 * step)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-2, abs=1e-3)


@pytest.mark.parametrize("code", ["simplex", "sphere"])
@pytest.mark.parametrize("autocast", [False, True])
def test_target_logits_agree_with_the_logits_of_a_turned_code(code, autocast):
    head = turned(ETFHead(16, 10, code=code, scale=3.0, learn_rotation=True)).eval()
    target = torch.arange(32) % 10
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits, own = head(FEATURES), head.target_logits(FEATURES, target)
    assert logits.dtype == own.dtype == torch.float32
    assert_close(own, logits[torch.arange(32), target])
    unturned = ETFHead(16, 10, code=code, scale=3.0).eval()
    assert_close(logits, 3 * unturned.embed(FEATURES) @ head.rotation.matrix().T @ head.weight.T)
    assert (logits - unturned(FEATURES)).abs().max() > 0.1


def test_a_turned_head_with_a_learned_scale_is_loaded_as_it_was_saved():
    trained = turned(ETFHead(16, 10, seed=1, scale=5.0, learn_scale=True, learn_rotation=True))
    with torch.no_grad():
        trained._log_scale.add_(0.7)
    loaded = ETFHead(16, 10, seed=2, scale=5.0, learn_scale=True, learn_rotation=True)
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded(FEATURES), trained(FEATURES))


def test_dot_regression_trains_a_turned_head_and_refuses_a_learned_scale():
    DotRegressionLoss().check_head(ETFHead(16, 10, learn_rotation=True))
    with pytest.raises(UserError, match="learns its own"):
        DotRegressionLoss().check_head(ETFHead(16, 10, learn_scale=True))


@pytest.mark.parametrize(("projection_dim", "linear"), [(9, True), (16, True), (40, False)])
def test_projection_is_linear_up_to_the_features_width_and_non_linear_above(projection_dim, linear):
    head = ETFHead(16, 10, projection_dim=projection_dim)
    assert head.weight.shape == (10, projection_dim)
    assert isinstance(head.projection, nn.Linear) is linear


def test_more_classes_than_dimensions_fit_behind_a_projection_or_on_a_sphere_code():
    with pytest.raises(UserError, match=r"K = 20 .*d = 16"):
        ETFHead(16, 20)
    assert ETFHead(16, 20, projection_dim=19).weight.shape == (20, 19)
    cosines = ETFHead(16, 20, code="sphere").weight
    assert (cosines @ cosines.T - 2 * torch.eye(20)).max() < 1e-6


def test_a_sphere_code_is_not_computed_where_a_state_dict_brings_it():
    trained = ETFHead(5, 30, code="sphere")
    with codes_from_state_dict():
        loaded, simplex = ETFHead(5, 30, code="sphere"), ETFHead(16, 10)
    assert loaded.weight.shape == trained.weight.shape
    assert loaded.weight.isnan().all()
    loaded.load_state_dict(trained.state_dict())
    assert torch.equal(loaded.weight, trained.weight)
    assert torch.equal(simplex.weight, ETFHead(16, 10).weight)
    assert torch.isfinite(ETFHead(5, 30, code="sphere").weight).all()


def test_a_non_linear_projection_reaches_a_rank_that_a_linear_map_cannot():
    projected = ETFHead(4, 20, projection_dim=30).projection(torch.randn(200, 4))
    assert torch.linalg.matrix_rank(projected - projected.mean(0)) > 4


def test_baselines_can_take_the_embedding_of_the_etf_head():
    etf = ETFHead(16, 10)
    linear = LinearHead(16, 10, feature_batch_norm=True, feature_normalize=True)
    cosine = CosineHead(16, 10, feature_batch_norm=True)
    for head in (linear, cosine):
        assert_close(head.embed(FEATURES), etf.embed(FEATURES))


def test_linear_head_is_torchs_linear_layer():
    torch.manual_seed(1)
    head = LinearHead(16, 10)
    torch.manual_seed(1)
    linear = nn.Linear(16, 10)
    assert_close(head(FEATURES), linear(FEATURES), rtol=0, atol=0)
    assert LinearHead(16, 10, use_bias=False).bias is None


def test_a_scaled_head_starts_as_its_linear_layer_and_shows_the_class_vectors_that_decide():
    head = ScaledLinearHead(16, 10)
    assert_close(head(FEATURES), head.linear(FEATURES), rtol=0, atol=0)
    with torch.no_grad():
        head.class_scale.copy_(torch.linspace(-1, 2, 10))
    assert_close(head(FEATURES), nn.functional.linear(FEATURES, head.weight, head.bias))
    assert_close(head.weight[9], 2 * head.linear.weight[9])


def test_a_frozen_linear_head_trains_its_batch_norm_only():
    head = LinearHead(16, 10, feature_batch_norm=True, frozen=True)
    assert [name for name, p in head.named_parameters() if p.requires_grad] == ["batch_norm.weight", "batch_norm.bias"]
    trained = [name for name, p in LinearHead(16, 10).named_parameters() if p.requires_grad]
    assert trained == ["weight", "bias"]


NO_SCALES = [0.0, -1.0, math.nan, math.inf]


@pytest.mark.parametrize(
    "bad",
    [
        *({"scale": scale} for scale in NO_SCALES),
        *({"projection_dim": width} for width in (0, -1, 10**30)),
        {"seed": -1},
        {"code": "cube"},
    ],
)
def test_etf_head_names_the_bad_argument(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        ETFHead(16, 10, **bad)


@pytest.mark.parametrize("scale", NO_SCALES)
def test_cosine_head_refuses_what_is_no_scale(scale):
    with pytest.raises(UserError, match=f"cosine_scale .* got {scale}"):
        CosineHead(16, 10, cosine_scale=scale)
