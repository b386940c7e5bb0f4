"""Heads that learn new classes session by session, on the pooled features of a backbone that does not change."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR

from etflight.analysis.outputs import class_vectors
from etflight.classifier import Classifier
from etflight.heads import CosineHead, ETFHead, Head
from etflight.losses import CrossEntropyLoss, Loss
from etflight.utils.errors import UserError, argument

Method = Literal["frame", "cosine", "ncm"]
LEARNING_RATES = {"frame": 2.5, "cosine": 0.1}  # of the methods that train


class Training(NamedTuple):
    """How the head is trained in a session: SGD with momentum 0.9 on all samples at once, under a cosine schedule that ends at 0.

    There is no random number in it, so it can be repeated exactly.

    Attributes:
        steps: The number of steps.
        lr: The learning rate of the first step.
        weight_decay: The weight decay.
    """

    steps: int
    lr: float
    weight_decay: float = 5e-5


class Learner(ABC):
    """A head that learns new classes session by session.

    It is in evaluation mode in training, too: statistics of BatchNorm stay those of the base session, since a few images, with one mean
    for each earlier class, could only spoil them.

    Args:
        head: The head of the base session; it stays as it is.
    """

    def __init__(self, head: Head) -> None:
        self.head = deepcopy(head).eval().requires_grad_(False).cpu()

    def begin(self, embedding: Tensor, labels: Tensor) -> None:  # noqa: B027  # not every learner needs it
        """Take what is kept of the base session's images: nothing, unless overridden.

        Args:
            embedding: The embeddings of all training images, `[N, d']`.
            labels: Their classes, `[N]`, int64.
        """

    @abstractmethod
    def learn(self, shots: Tensor, labels: Tensor, memory: Tensor) -> None:
        """Take on the next classes.

        Args:
            shots: The features of the new classes' images, `[n, d]`.
            labels: The classes of the shots, `[n]`, int64, at least m.
            memory: The mean features of the m earlier classes, `[m, d]`.

        Raises:
            UserError: The training diverges.
        """

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits `[N, seen]` of features `[N, d]`, the largest of which decides."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return what was learnt, as tensors."""

    @abstractmethod
    def load(self, state: dict[str, Tensor], seen: int) -> None:
        """Go back to a state of this learner in which `seen` classes had been seen."""


class FrameLearner(Learner):
    """NC-FSCIL: the class vectors of all classes, those to come too, are a fixed frame; only the embedding before it is trained.

    It minimises `1/S Σ_c 1/n_c Σ_{i in c} L(h_i, w_c)` over the S classes seen so far, where each earlier class has one sample, the
    embedding of its mean feature, and each new class its shots. L is the loss of the base session: for dot regression `(1 - <w_c, h>)²/2`.
    All parameters of the head are trained.

    Args:
        head: An `ETFHead` with reserved classes.
        loss: The loss of the base session, whose class balance is replaced by the mean over classes above.
        training: How to train.
        num_classes: The number of classes that will come to be known, for an early error.

    Raises:
        UserError: The head has no frame with as many vectors, or nothing to train.

    Source:
        Yang et al., "Neural Collapse Inspired Feature-Classifier Alignment for Few-Shot Class-Incremental Learning", ICLR 2023, arXiv
        2302.03004; the mean over classes is that of its released code (`with_len`). Its learning rate of 0.25 on ten times the
        loss with weight decay 5e-4 is a rate of 2.5 on the loss with 5e-5.
    """

    def __init__(self, head: Head, loss: Loss, training: Training, num_classes: int) -> None:
        if not isinstance(head, ETFHead):
            raise UserError(
                f"method frame needs an ETFHead with reserved_classes, but the base session has a {type(head).__name__}: "
                f"give {argument('method', 'cosine')} or ncm"
            )
        if len(head.frame) < num_classes:
            raise UserError(
                f"the frame of the base session has {len(head.frame)} vectors for {num_classes} classes: train it with "
                f"{argument('model.head.reserved_classes', num_classes - head.num_classes)}"
            )
        super().__init__(head)
        if not any(True for _ in self.head.parameters()):
            raise UserError(
                "method frame trains the projection, but the head of the base session has none: give it one"
            )
        self.loss = deepcopy(loss).eval().cpu()
        self.training = training

    def learn(self, shots: Tensor, labels: Tensor, memory: Tensor) -> None:
        """Train the embedding so that means and shots meet their vectors of the frame."""
        head = cast(ETFHead, self.head).extended(int(labels.max()) + 1)
        features, classes = torch.cat([memory, shots]), torch.cat([torch.arange(len(memory)), labels])
        head.requires_grad_()
        _descend(head.parameters(), lambda: session_loss(self.loss, head(features), classes), self.training)
        self.head = head.requires_grad_(False)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the head's logits."""
        return cast(Tensor, self.head(features))

    def state(self) -> dict[str, Tensor]:
        """Return the state dict of the head."""
        return self.head.state_dict()

    def load(self, state: dict[str, Tensor], seen: int) -> None:
        """Load a state dict of the head."""
        self.head = cast(ETFHead, self.head).extended(seen)
        self.head.load_state_dict(state)


class CosineLearner(Learner):
    """The learnable control: a class vector for each class, compared by cosine; they are trained, the embedding is not.

    The vectors of the base classes are the trained head's, scaled to norm 1 (without biases); those of new classes start at the mean of
    the normalised embeddings of their shots. All of them are trained by cross-entropy on `scale · cos`, with the samples and the mean over
    classes of `FrameLearner`.

    Args:
        head: Any head with class vectors.
        training: How to train.

    Attributes:
        scale: The factor of the cosine: that of a `CosineHead`, else 16, the default of one.
        vectors: The class vectors `[seen, d']`.

    Source:
        Gidaris & Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, arXiv 1804.09458, for class
        vectors from means of normalised features.
    """

    def __init__(self, head: Head, training: Training) -> None:
        super().__init__(head)
        self.training = training
        self.scale = float(head.scale) if isinstance(head, CosineHead) else 16.0
        self.vectors = F.normalize(self.head.weight.detach().float(), dim=1)

    def learn(self, shots: Tensor, labels: Tensor, memory: Tensor) -> None:
        """Add the means of the shots, then train all vectors."""
        features, classes = torch.cat([memory, shots]), torch.cat([torch.arange(len(memory)), labels])
        embedding = self._embed(features)
        start = class_means(self._embed(shots), labels - len(memory))
        vectors = nn.Parameter(torch.cat([self.vectors, F.normalize(start, dim=1)]))
        loss = CrossEntropyLoss().eval()
        _descend([vectors], lambda: session_loss(loss, self._cosines(embedding, vectors), classes), self.training)
        self.vectors = F.normalize(vectors.detach(), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the scaled cosines."""
        return self._cosines(self._embed(features), self.vectors)

    def _embed(self, features: Tensor) -> Tensor:
        return F.normalize(self.head.embed(features).float(), dim=1)

    def _cosines(self, embedding: Tensor, vectors: Tensor) -> Tensor:
        return self.scale * embedding @ F.normalize(vectors, dim=1).T

    def state(self) -> dict[str, Tensor]:
        """Return the vectors."""
        return {"vectors": self.vectors}

    def load(self, state: dict[str, Tensor], seen: int) -> None:
        """Take the vectors."""
        self.vectors = state["vectors"]


class NearestMeanLearner(Learner):
    """The control that trains nothing: an image belongs to the class whose mean embedding has the largest cosine with its own.

    Args:
        head: Any head; only its embedding is used.

    Attributes:
        means: The mean embeddings of the classes seen so far, of new classes those of their shots, `[seen, d']`.
    """

    def __init__(self, head: Head) -> None:
        super().__init__(head)
        self.means = torch.empty(0)

    def begin(self, embedding: Tensor, labels: Tensor) -> None:
        """Take the mean embedding of each base class."""
        self.means = class_means(embedding, labels)

    def learn(self, shots: Tensor, labels: Tensor, memory: Tensor) -> None:
        """Add the mean embeddings of the shots."""
        self.means = torch.cat([self.means, class_means(self.head.embed(shots), labels - len(memory))])

    def logits(self, features: Tensor) -> Tensor:
        """Compute the cosines.

        Raises:
            UserError: `begin` has not been called.
        """
        if not len(self.means):
            raise UserError(
                "NearestMeanLearner knows no class yet: call its begin with the embeddings of the base classes"
            )
        return F.normalize(self.head.embed(features).float(), dim=1) @ F.normalize(self.means, dim=1).T

    def state(self) -> dict[str, Tensor]:
        """Return the means."""
        return {"means": self.means}

    def load(self, state: dict[str, Tensor], seen: int) -> None:
        """Take the means."""
        self.means = state["means"]


# What they share ----------------------------------------------------------------------------------------------------


def class_means(values: Tensor, labels: Tensor) -> Tensor:
    """Average the rows of each class, in float64.

    Args:
        values: `[N, d]`.
        labels: The classes `[N]`, int64, each of 0 … K-1 at least once.

    Returns:
        `[K, d]` float32.
    """
    counts = labels.bincount()
    sums = torch.zeros(len(counts), values.shape[1], dtype=torch.float64).index_add_(0, labels, values.double())
    return (sums / counts[:, None]).float()


def session_loss(loss: Loss, logits: Tensor, labels: Tensor) -> Tensor:
    """Average a loss over the samples of each class, then over the classes.

    Args:
        loss: The loss, in evaluation mode.
        logits: `[B, K]`.
        labels: `[B]`, int64.

    Returns:
        The scalar loss.
    """
    counts = labels.bincount()
    return (loss.sample_losses(logits, labels) / counts[labels]).sum() / (counts > 0).sum()


def _descend(parameters: Iterable[Tensor], objective: Callable[[], Tensor], training: Training) -> None:
    trained = list(parameters)
    optimizer = SGD(trained, training.lr, momentum=0.9, weight_decay=training.weight_decay)
    schedule = CosineAnnealingLR(optimizer, training.steps)
    mend = f"give a smaller {argument('lr')} than {training.lr:g}"
    for _ in range(training.steps):
        optimizer.zero_grad()
        loss = objective()
        if not bool(loss.isfinite()):
            raise UserError(f"the loss of a session became {loss.item()}: {mend}")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if not all(bool(weights.detach().norm().isfinite()) for weights in trained):
        raise UserError(f"the weights of a session became too large: {mend}")


def new_learner(
    model: Classifier, num_classes: int, method: Method = "frame", *, steps: int = 200, lr: float | None = None
) -> Learner:
    """Make a learner from the trained model of a base session.

    Args:
        model: The model; it stays as it is.
        num_classes: The number of classes that will come to be known.
        method: "frame" for `FrameLearner`, "cosine" for `CosineLearner`, "ncm" for `NearestMeanLearner`.
        steps: The steps of SGD in each session.
        lr: The learning rate at first; None: 2.5 for "frame", 0.1 for "cosine".

    Raises:
        UserError: The learning rate is not positive and finite, or the method trains nothing; or the head does not go with the method.
    """
    if lr is not None and method == "ncm":
        raise UserError(f"{argument('lr')}: method ncm trains nothing: leave it out")
    if lr is not None and not 0 < lr < math.inf:
        raise UserError(f"{argument('lr')} is {lr}: give a positive, finite number")
    if method == "ncm":
        return NearestMeanLearner(model.head)
    training = Training(steps, LEARNING_RATES[method] if lr is None else lr)
    if method == "frame":
        return FrameLearner(model.head, model.loss, training, num_classes)
    class_vectors(model)  # or an error, if there are none
    return CosineLearner(model.head, training)
