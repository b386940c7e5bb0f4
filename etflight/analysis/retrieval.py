"""Whether models that were trained apart share their embedding space: images searched by one model's embeddings among another's."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etflight.analysis.outputs import Outputs, class_vectors, outputs
from etflight.classifier import Classifier
from etflight.data.base import ImageDataModule
from etflight.data.facts import different_class
from etflight.metrics.retrieval import retrieval_scores
from etflight.utils.errors import UserError


class Embedded(NamedTuple):
    """What one model makes of the images.

    Attributes:
        outputs: Its outputs over the images.
        weight: Its class vectors `[K, d]`, on the CPU.
    """

    outputs: Outputs
    weight: Tensor


def retrieval(
    models: Sequence[Classifier],
    data: Sequence[ImageDataModule],
    device: torch.device | None = None,
    *,
    quiet: bool = True,
) -> dict[str, Any]:
    """Let each model's embeddings of the test images look for those of every model. See `compare` for what is returned.

    Args:
        models: Models with the same classes.
        data: For each model a data module of the same images, prepared as in its own training.
        device: The device to compute on, to which the models are moved; None: where each is.
        quiet: Whether to show no progress bar.

    Raises:
        UserError: The models have other classes or widths.
    """
    refuse_other_classes([(f"model {i}", model) for i, model in enumerate(models)])
    embedded = [
        Embedded(outputs(model, own, "test", device, quiet=quiet), class_vectors(model))
        for model, own in zip(models, data, strict=True)
    ]
    return compare(embedded)


def compare(models: Sequence[Embedded]) -> dict[str, Any]:
    """Let each model's embeddings of the images look for those of every model; an image never finds itself.

    Args:
        models: At least one model.

    Returns:
        `class_vectors_differ`, the largest difference between the class vectors of two models; `pairs`, for each space, query and gallery
        model (by their positions) the scores; `mean_of_all`, for each space those of the mean of all models' embeddings, each of norm 1.
    """
    spaces: dict[str, Callable[[Embedded, Embedded], Tensor]] = {
        "embedding": lambda model, first: model.outputs.embedding,
        "rotated": _rotated,  # the part of the embedding that the class vectors span
        "logits": lambda model, first: model.outputs.logits - model.outputs.logits.mean(1, keepdim=True),
    }
    first, labels = models[0], models[0].outputs.labels
    pairs: list[dict[str, Any]] = []
    means: list[dict[str, Any]] = []
    for name, space in spaces.items():
        embedded = [torch.nn.functional.normalize(space(model, first).double(), dim=1) for model in models]
        for (i, queries), (j, gallery) in product(enumerate(embedded), repeat=2):
            scores = retrieval_scores(queries, labels, gallery, labels, same_images=True)
            pairs.append({"space": name, "query": i, "gallery": j, **scores._asdict()})
        mean = torch.stack(embedded).mean(0)
        means.append({"space": name, **retrieval_scores(mean, labels, mean, labels, same_images=True)._asdict()})
    weights = torch.stack([model.weight for model in models])
    differ = float((weights.amax(0) - weights.amin(0)).max())
    return {"class_vectors_differ": differ, "pairs": pairs, "mean_of_all": means}


def _rotated(model: Embedded, first: Embedded) -> Tensor:
    """The embedding turned so that the model's class vectors come as near as they can to those of the first model.

    Class vectors say nothing of directions that they do not span, so the embedding's part in those is left out.
    """
    left, values, right = torch.linalg.svd(model.weight.double().T @ first.weight.double(), full_matrices=False)
    spanned = values > values[0] * max(model.weight.shape) * torch.finfo(model.weight.dtype).eps
    rotation: Tensor = left[:, spanned] @ right[spanned]
    return model.outputs.embedding.double() @ rotation


def refuse_other_classes(models: Sequence[tuple[str, Classifier]]) -> None:
    """Refuse models that cannot be compared.

    Args:
        models: The models with their names.

    Raises:
        UserError: Their class vectors have other shapes, or their classes other names.
    """
    (first, one), *others = models
    shape = list(class_vectors(one, first).shape)
    for name, model in others:
        if (own := list(class_vectors(model, name).shape)) != shape:
            raise UserError(
                f"{name} has class vectors {own}, but {first} {shape}: give models of the same classes and width"
            )
        if differ := different_class(one.class_names, model.class_names):
            k, its, other = differ
            raise UserError(
                f"class {k} is {its!r} in {first}, but {other!r} in {name}: give models of the same classes"
            )
