import numpy as np
import pytest
import torch

from etflight import CosineHead, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead
from etflight.analysis.incremental import Features, run_sessions, score, summary
from etflight.analysis.learners import (
    CosineLearner,
    FrameLearner,
    Learner,
    NearestMeanLearner,
    Training,
    class_means,
    session_loss,
)
from etflight.utils.errors import UserError
from tests.left_by_runs import differences

BASE, LATER, DIM = 3, 2, 5
ONE_STEP = Training(steps=1, lr=0.3, weight_decay=0.01)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def frame_head(**options):
    return ETFHead(DIM, BASE, **{"projection_dim": 8, "reserved_classes": LATER} | options)


def blobs(seed=0):
    """Features of a base session of 3 classes and two sessions of 1 class with 4 shots, around random centres."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(BASE + LATER, DIM)) * 2

    def draw(classes, n):
        labels = np.repeat(classes, n)
        values = centres[labels] + rng.normal(size=(len(labels), DIM))
        return torch.tensor(values, dtype=torch.float32), torch.tensor(labels)

    base = draw(np.arange(BASE), 30)
    return base, Features(class_means(*base), [draw([3], 4), draw([4], 4)], draw(np.arange(BASE + LATER), 20))


def run(learner, before=None):
    base, features = blobs()
    with torch.no_grad():
        learner.begin(learner.head.embed(base[0]), base[1])
    return list(run_sessions(learner, features, before))


LEARNERS = {
    "frame": lambda: FrameLearner(frame_head(), DotRegressionLoss(), Training(20, 0.5), BASE + LATER),
    "frame, cross-entropy": lambda: FrameLearner(
        frame_head(scale=8.0), CrossEntropyLoss(), Training(20, 0.1), BASE + LATER
    ),
    "cosine": lambda: CosineLearner(CosineHead(DIM, BASE), Training(20, 0.1)),
    "cosine of a linear head": lambda: CosineLearner(LinearHead(DIM, BASE), Training(20, 0.1)),
    "ncm": lambda: NearestMeanLearner(LinearHead(DIM, BASE)),
}


@pytest.fixture(params=LEARNERS)
def make(request):
    """Makes the learner anew, from the same base session."""

    def made():
        torch.manual_seed(0)
        return LEARNERS[request.param]()

    return made


# --- against NumPy ----------------------------------------------------------------------------------------------------


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def test_the_mean_over_classes_of_dot_regression_is_numpys():
    cosines = torch.randn(7, 4, dtype=torch.float64)
    labels = torch.tensor([0, 1, 3, 3, 3, 0, 3])
    z, y = cosines.numpy(), labels.numpy()
    by_class = [np.mean([(z[i, k] - 1) ** 2 / 2 for i in range(7) if y[i] == k]) for k in (0, 1, 3)]
    assert float(session_loss(DotRegressionLoss().eval(), cosines, labels)) == pytest.approx(
        np.mean(by_class), rel=1e-12
    )


def samples():
    shots, labels, memory = torch.randn(4, DIM), torch.tensor([3, 3, 3, 4]), torch.randn(3, DIM)
    weights = np.array([1, 1, 1, 1 / 3, 1 / 3, 1 / 3, 1]) / 5  # each of five classes counts the same
    x, y = torch.cat([memory, shots]).double().numpy(), np.array([0, 1, 2, 3, 3, 3, 4])
    return (shots, labels, memory), x, y, weights


def test_a_step_of_the_frame_method_is_the_gradient_step_of_dot_regression_computed_by_hand():
    head = frame_head(projection_dim=4, batch_norm=False)
    learner = FrameLearner(head, DotRegressionLoss(class_balance="batch"), ONE_STEP, 5)
    given, x, y, weights = samples()
    W, frame = head.embedder.projection.weight.detach().double().numpy(), head.frame.double().numpy()
    h = x @ W.T
    u, w = unit(h), frame[y]
    cos = (u * w).sum(1, keepdims=True)
    into_h = -(1 - cos) * (w - cos * u) / np.linalg.norm(h, axis=1, keepdims=True) * weights[:, None]
    learner.learn(*given)
    expected = W - ONE_STEP.lr * (into_h.T @ x + ONE_STEP.weight_decay * W)
    np.testing.assert_allclose(learner.head.embedder.projection.weight.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(learner.head.weight.numpy(), head.frame.numpy())


def test_a_step_of_the_cosine_head_is_the_gradient_step_of_cross_entropy_computed_by_hand():
    head = CosineHead(DIM, 3, scale=7.0)
    given, x, y, weights = samples()
    e = unit(x)
    start = unit(np.stack([e[y == k].mean(0) for k in (3, 4)]))
    V = np.concatenate([unit(head.weight.detach().double().numpy()), start])
    z = 7 * e @ V.T
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    into_z = (p - np.eye(5)[y]) * weights[:, None]
    into_v = 7 * into_z.T @ e  # before the normalisation, whose Jacobian at norm 1 is I - v vᵀ
    tangent = into_v - (into_v * V).sum(1, keepdims=True) * V
    learner = CosineLearner(head, ONE_STEP)
    learner.learn(*given)
    expected = unit(V - ONE_STEP.lr * (tangent + ONE_STEP.weight_decay * V))
    np.testing.assert_allclose(learner.vectors.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_nearest_class_means_accuracy_is_numpys():
    (base, base_labels), features = blobs()
    known, y = [base.numpy()[base_labels == k].mean(0) for k in range(BASE)], features.test[1].numpy()
    accuracies = []
    for shots in [None, *features.shots]:
        known += [] if shots is None else [shots[0].numpy().mean(0)]
        seen = y < len(known)
        decided = (unit(features.test[0].numpy()[seen]) @ unit(np.stack(known)).T).argmax(1)
        accuracies.append((decided == y[seen]).mean())
    results = run(LEARNERS["ncm"]())[-1].results
    assert [row["acc"] for row in results] == pytest.approx(accuracies)
    assert 0.5 < min(accuracies) < 1


# --- what holds for all -----------------------------------------------------------------------------------------------


def test_sessions_go_on_after_any_of_them_bit_by_bit(make):
    whole = run(make())
    assert len(whole) == 3
    for after in range(2):
        assert differences(run(make(), whole[after]), whole[after + 1 :]) == []


def test_the_head_of_the_base_session_stays_as_it_is(make):
    head = make().head
    before = {name: value.clone() for name, value in head.state_dict().items()}
    learner = make()
    trained = learner.head
    run(learner)
    assert differences(before, dict(trained.state_dict())) == []


def test_a_session_knows_of_earlier_classes_only_their_means_and_decides_between_those_seen():
    class Spy(Learner):
        given = []  # noqa: RUF012

        def learn(self, shots, labels, memory):
            self.given.append((labels.tolist(), memory))

        def logits(self, features):
            return torch.zeros(len(features), 3)

        def state(self):
            return {}

        def load(self, state, seen):
            pass

    _, features = blobs()
    done = list(run_sessions(Spy(LinearHead(DIM, BASE)), features))
    assert [labels for labels, _ in Spy.given] == [[3] * 4, [4] * 4]
    torch.testing.assert_close(Spy.given[0][1], features.base)
    torch.testing.assert_close(Spy.given[1][1], torch.cat([features.base, features.shots[0][0].mean(0, keepdim=True)]))
    assert [row["acc"] for row in done[-1].results] == pytest.approx([1 / 3, 1 / 4, 1 / 5])  # always class 0


def test_batch_norm_keeps_the_statistics_of_the_base_session_and_its_scale_is_trained():
    head = frame_head()
    with torch.no_grad():
        head.train()(torch.randn(40, DIM) * 3 + 1)
    learner = FrameLearner(head, DotRegressionLoss(), Training(3, 0.5), 5)
    learner.learn(*samples()[0])
    trained, before = learner.head.state_dict(), head.state_dict()
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(trained[f"embedder.batch_norm.{name}"], before[f"embedder.batch_norm.{name}"])
    for name in ("batch_norm.weight", "projection.0.weight"):
        assert not torch.equal(trained[f"embedder.{name}"], before[f"embedder.{name}"])


def test_training_in_a_session_meets_the_reserved_vectors():
    learner = FrameLearner(frame_head(), DotRegressionLoss(), Training(100, 1.0), 5)
    given, *_ = samples()
    learner.learn(*given)
    before = frame_head().extended(5).eval()
    with torch.no_grad():
        cosines = [logits[range(4), given[1]].mean() for logits in (before(given[0]), learner.logits(given[0]))]
    assert cosines[1] > max(cosines[0], 0.8)
    assert learner.logits(given[0]).argmax(1).tolist() == [3, 3, 3, 4]
    assert torch.equal(learner.head.weight, frame_head().frame)


# --- scores and refusals ------------------------------------------------------------------------------------------------


def test_forgetting_and_performance_drop_are_what_they_are_called():
    labels = torch.tensor([0, 0, 1, 1, 2, 3])
    first = score(0, torch.tensor([0, 0, 1, 0]), labels[:4], 2)
    assert first == {"session": 0, "acc": 0.75, "acc_base": 0.75, "acc_new": None, "forgetting": 0.0}
    second = score(1, torch.tensor([0, 2, 1, 0, 2]), labels[:5], 2, [first])
    assert second == {"session": 1, "acc": 0.6, "acc_base": 0.5, "acc_new": 1.0, "forgetting": 0.25}
    third = score(2, torch.tensor([2, 2, 1, 0, 2, 0]), labels, 2, [first, second])
    assert third == {"session": 2, "acc": 2 / 6, "acc_base": 0.25, "acc_new": 0.5, "forgetting": 0.5}
    sums = summary([first, second, third])
    assert sums == pytest.approx({"performance_drop": 0.75 - 2 / 6, "average_acc": (0.75 + 0.6 + 2 / 6) / 3})


@pytest.mark.parametrize("what", ["base", "shots", "test"])
def test_features_that_are_no_numbers_are_refused_before_the_first_session(make, what):
    _, features = blobs()
    tensor = {"base": features.base, "shots": features.shots[1][0], "test": features.test[0]}[what]
    tensor[1, 0] = torch.nan
    with pytest.raises(UserError, match=r"1 of \d+ features of .* are NaN or infinite, the first is row 1: "):
        next(run_sessions(make(), features))


def test_class_means_keep_what_float32_sums_lose():
    values = torch.tensor([[1e8], [3.0], [3.0], [-1e8]])
    assert class_means(values, torch.tensor([0, 1, 0, 0])).tolist() == [[1.0], [3.0]]


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            lambda: LinearHead(DIM, BASE),
            "needs an ETFHead with reserved_classes, but the base session has a LinearHead",
        ),
        (
            lambda: frame_head(reserved_classes=1),
            "has 4 vectors for 5 classes: train it with reserved_classes=2",
        ),
        (lambda: frame_head(projection_dim=None, batch_norm=False), "trains the projection, but the head .* has none"),
    ],
)
def test_a_head_that_cannot_learn_more_is_refused(head, message):
    with pytest.raises(UserError, match=message):
        FrameLearner(head(), DotRegressionLoss(), ONE_STEP, BASE + LATER)


def test_a_session_that_diverges_says_so():
    for steps, message in ((50, "the loss of a session became .*"), (1, "the weights of a session became too large")):
        learner = CosineLearner(CosineHead(DIM, BASE), Training(steps, 1e38))
        with pytest.raises(UserError, match=rf"{message}: give a smaller lr than 1e"):
            learner.learn(*samples()[0])


def test_a_learner_that_knows_no_class_says_what_is_missing():
    with pytest.raises(UserError, match="call its begin with the embeddings of the base classes"):
        NearestMeanLearner(LinearHead(DIM, BASE)).logits(torch.zeros(2, DIM))
