"""Retrieval: how well embeddings find images of the same class."""

from typing import NamedTuple

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from etflight.utils.errors import UserError
from etflight.utils.precision import in_float64, refuse_not_finite

_CHUNK = 512  # queries at a time: with a gallery of 100,000 their similarities take 0.4 GB in float64


class RetrievalScores(NamedTuple):
    """How well queries find gallery images of their class; means over the queries that have any, in [0, 1].

    Attributes:
        recall_at_1: The part of the queries whose nearest gallery image has their class.
        mean_average_precision: The mean over queries of the precision at each image of their class.
    """

    recall_at_1: float
    mean_average_precision: float


def retrieval_scores(
    queries: Tensor, query_labels: Tensor, gallery: Tensor, gallery_labels: Tensor, *, same_images: bool = False
) -> RetrievalScores:
    """Rank the gallery by its cosine with each query.

    Args:
        queries: Embeddings `[Q, d]`, any float dtype.
        query_labels: Class indices `[Q]`.
        gallery: Embeddings `[N, d]`.
        gallery_labels: Class indices `[N]`.
        same_images: Whether query i and gallery image i are one image, perhaps embedded by two models; then it does not find itself.

    Returns:
        The scores, computed in float64. The order of equal cosines is any.

    Raises:
        UserError: The shapes do not fit, or no query has an image of its class in the gallery, or an embedding is not finite.
    """
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise UserError(
            f"retrieval compares embeddings [Q, d] and [N, d], got {list(queries.shape)} and {list(gallery.shape)}: "
            "give models with embeddings of one width"
        )
    for name, embeddings, labels in (("query", queries, query_labels), ("gallery", gallery, gallery_labels)):
        if labels.shape != embeddings.shape[:1]:
            raise UserError(
                f"{name}_labels has shape {list(labels.shape)}, but there are {len(embeddings)} embeddings: give one each"
            )
        refuse_not_finite(f"{name} embeddings", embeddings)
    if same_images and len(queries) != len(gallery):
        raise UserError(f"{len(queries)} queries and {len(gallery)} gallery images cannot be the same images")
    unit = F.normalize(in_float64(gallery), dim=1).T.cpu()
    own, others = query_labels.cpu().numpy(), gallery_labels.cpu().numpy()
    hits: list[NDArray[np.bool_]] = []
    precisions: list[NDArray[np.float64]] = []
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        distances = -(F.normalize(in_float64(queries[rows]), dim=1).cpu() @ unit).numpy()
        relevant = own[rows, None] == others
        if same_images:
            itself = np.arange(len(distances)), np.arange(start, start + len(distances))
            distances[itself], relevant[itself] = np.inf, False
        # NumPy's sort is five times as fast as torch's on a CPU
        relevant = np.take_along_axis(relevant, np.argsort(distances, axis=1), axis=1)
        query, place = np.nonzero(relevant)
        counts = relevant.sum(axis=1)
        before = np.repeat(counts.cumsum() - counts, counts)  # hits of the queries before this one
        found = 1 + np.arange(len(query)) - before  # hits of this query up to this place
        sums = np.bincount(query, found / (place + 1), minlength=len(counts))
        asked = counts > 0
        hits.append(relevant[asked, 0])
        precisions.append(sums[asked] / counts[asked])
    if not sum(map(len, hits)):
        raise UserError("no query has an image of its class in the gallery: give sets with common classes")
    return RetrievalScores(float(np.concatenate(hits).mean()), float(np.concatenate(precisions).mean()))
