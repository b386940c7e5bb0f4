"""How well a trained model tells images of unknown classes from those of its own classes, by scores that need no training."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from etflight.analysis.outputs import Outputs, class_vectors, outputs
from etflight.classifier import Classifier
from etflight.data.adapted import AdaptedSplit
from etflight.data.base import ImageDataModule
from etflight.data.sources import ImageSplit
from etflight.metrics import ClassStatistics, Moments, measures, ood
from etflight.utils.errors import UserError, argument, first_few, warn

_USUAL_K = 50  # of the paper for CIFAR-10
RAW = "_raw"  # ends the names of what is computed from pooled features instead of embeddings

Score = Callable[[Outputs], Tensor]


class Question(NamedTuple):
    """What is compared, checked before any image goes through the model. `ask` makes it, `separations` answers it.

    Attributes:
        model: The trained model.
        weight: Its class vectors `[K, d']`.
        known: The data module of its training, whose test images are the known ones.
        unknown: The images of other classes, as the model takes them.
        adapted: Whether these had to be resized, or their colours converted.
        shared_classes: The names of unknown classes that the model knows.
        k: The neighbour of `knn`.
        components: The number of principal components of `neco`.
    """

    model: Classifier
    weight: Tensor
    known: ImageDataModule
    unknown: ImageSplit
    adapted: bool
    shared_classes: list[str]
    k: int
    components: int


class Separations(NamedTuple):
    """How well scores tell known from unknown test images.

    Attributes:
        scores: The scores of the known and of the unknown images, `[N]` and `[M]`, by the score's name.
        separations: What they are worth, by name.
        left_out: Why others do not apply, by name.
        nc5: The mean `|cos|` of class means and the mean of the unknown images: `nc5`, and `nc5_raw` of pooled features that differ.
        temperature: The temperature of `msp` and `energy`.
        train_images: The number of training images that the scores were fitted to.
        test_images: The number of known test images.
    """

    scores: dict[str, tuple[Tensor, Tensor]]
    separations: dict[str, ood.Separation]
    left_out: dict[str, str]
    nc5: dict[str, float]
    temperature: float
    train_images: int
    test_images: int


def ask(
    model: Classifier,
    known: ImageDataModule,
    unknown: ImageDataModule,
    *,
    k: int | None = None,
    components: int | None = None,
    adapt: bool = False,
) -> Question:
    """Check what is to be compared.

    Args:
        model: The trained model.
        known: The data module of its training.
        unknown: A data module whose test images are of other classes; its labels and its normalisation do not count.
        k: The score `knn` is the distance to the k-th nearest training image; None: 50, at most the images of the smallest class.
        components: The number of principal components of `neco`; None: K - 1.
        adapt: Whether unknown images of another size are resized (bilinearly), and grey turned into RGB or RGB into grey.

    Raises:
        UserError: The unknown images have another shape and are not to be adapted, or are known test images; a number is out of range; or
            the model has no class vectors.
    """
    weight = class_vectors(model)
    shared = _shared_classes(model, known, unknown)
    images = unknown.split("test")
    adapted = tuple(images.source.image_shape) != known.preprocessing.input_size
    if adapted:
        images = _adapted(images, known, unknown, adapt)
    _refuse_known_images(known, unknown)
    k = _neighbour(k, known.class_counts.tolist())
    if (components or 0) >= (width := weight.shape[1]):
        given = argument("components", components)
        raise UserError(f"{given} leave none of {width} dimensions out: give less than {width}")
    return Question(model, weight, known, images, adapted, shared, k, components or len(weight) - 1)


def separations(question: Question, device: torch.device | None = None, *, quiet: bool = True) -> Separations:
    """Fit all scores to the training images, and compare those of the known and of the unknown test images.

    Args:
        question: What is compared.
        device: The device to compute on, to which the model is moved; None: where the model is.
        quiet: Whether to show no progress bar.
    """
    model, known = question.model, question.known
    train, test = (outputs(model, known, split, device, quiet=quiet) for split in ("train", "test"))
    others = outputs(model, known.with_test_images(question.unknown), "test", device, quiet=quiet)
    same = train.features.shape == train.embedding.shape and torch.equal(train.features, train.embedding)
    stats = {end: _statistics(_in(train, end), train.labels, len(question.weight)) for end in ("", RAW)[: 2 - same]}
    temperature = model.decision.temperature_of_bare_logits()
    functions, left_out = scores_of(train, stats, question, temperature)
    scores = {name: (score(test), score(others)) for name, score in functions.items()}
    return Separations(
        scores,
        {name: ood.separation(*both) for name, both in scores.items()},
        left_out,
        {f"nc5{end}": float(measures.nc5(own, _in(others, end).double().mean(0))) for end, own in stats.items()},
        temperature,
        len(train.labels),
        len(test.labels),
    )


def scores_of(
    train: Outputs, stats: Mapping[str, Moments], question: Question, temperature: float
) -> tuple[dict[str, Score], dict[str, str]]:
    """Fit all scores to a model's outputs on its training images.

    Args:
        train: The outputs on the training images.
        stats: The class statistics of the embeddings under "" and, if they differ, of the pooled features under `RAW`.
        question: What is compared.
        temperature: The temperature of `msp` and `energy`.

    Returns:
        The scores, and why others do not apply, by name.
    """
    weight, number = question.weight, question.components
    functions: dict[str, Score] = {
        "msp": lambda out: ood.msp(out.logits, temperature),
        "max_logit": lambda out: ood.max_logit(out.logits),
        "energy": lambda out: ood.energy(out.logits, temperature),
        "largest_cosine": lambda out: ood.largest_cosine(out.embedding, weight),
        "span_norm": lambda out: ood.span_norm(out.embedding, weight),
    }
    left_out: dict[str, str] = {}
    if len(ood.span_of(weight).basis) == weight.shape[1]:
        del functions["span_norm"]
        left_out["span_norm"] = f"{len(weight)} class vectors span all {weight.shape[1]} dimensions"
    for end in stats:
        features = _in(train, end)
        functions[f"mahalanobis{end}"] = _of_features(end, partial(ood.mahalanobis, stats=stats[end]))
        functions[f"knn{end}"] = _of_features(end, partial(ood.knn, train_features=features, k=question.k))
        if number < (width := features.shape[1]):
            subspace = ood.principal_subspace(features, number)
            functions[f"neco{end}"] = _of_features(end, partial(ood.neco, subspace=subspace))
            functions[f"neco_max_logit{end}"] = _neco_max_logit(end, subspace)
        else:
            reason = f"{number} components leave none of {width} dimensions out: give fewer ({argument('components')})"
            left_out |= {f"neco{end}": reason, f"neco_max_logit{end}": reason}
    return functions, left_out


def _of_features(end: str, score: Callable[[Tensor], Tensor]) -> Score:
    return lambda out: score(_in(out, end))


def _neco_max_logit(end: str, subspace: ood.Subspace) -> Score:
    return lambda out: ood.neco_max_logit(_in(out, end), out.logits, subspace)


def _in(out: Outputs, end: str) -> Tensor:
    return out.features if end == RAW else out.embedding


def _statistics(features: Tensor, labels: Tensor, num_classes: int) -> Moments:
    statistics = ClassStatistics(num_classes, features.shape[1])
    statistics.update(features, labels)
    return statistics.compute()


# What is compared ---------------------------------------------------------------------------------------------------


def _adapted(images: ImageSplit, known: ImageDataModule, unknown: ImageDataModule, adapt: bool) -> ImageSplit:
    takes = known.preprocessing
    if not adapt:
        own, other = ("×".join(map(str, size)) for size in (images.source.image_shape, takes.input_size))
        raise UserError(
            f"{unknown} has images of {own} (channels × height × width), but the model takes {other}: "
            f"give {argument('adapt', True)} to resize them and convert their colours, or another set"
        )
    return AdaptedSplit(images, takes, str(unknown))


def _shared_classes(model: Classifier, known: ImageDataModule, unknown: ImageDataModule) -> list[str]:
    """The names of unknown classes that are known, of which a warning tells; mere numbers are no names."""
    names = {name.casefold() for name in model.class_names or known.class_names if not name.isdecimal()}
    shared = [name for name in unknown.class_names if name.casefold() in names]
    if shared:
        told = first_few(shared, len(shared))
        warn(f"{unknown} is taken as unknown, but the model knows classes of these names: {told}")
    return shared


def _refuse_known_images(known: ImageDataModule, unknown: ImageDataModule) -> None:
    own, others = known.split("test"), unknown.split("test")
    same = (own.source.content, own.source.folder) == (others.source.content, others.source.folder)
    if same and len(np.intersect1d(own.indices, others.indices)):
        raise UserError(f"{unknown} holds test images of the run itself, which are known: give images of other classes")


def _neighbour(given: int | None, class_counts: list[int]) -> int:
    """The k of `knn`: what was given, or else 50, at most the images of the smallest class that has some.

    Raises:
        UserError: There are not so many training images.
    """
    if given is None:
        return min(_USUAL_K, *(count for count in class_counts if count))
    if given > (size := sum(class_counts)):
        raise UserError(
            f"{argument('k', given)} is more than the {size} training images of the run: give {size} or less"
        )
    return given
