"""What a training step minimises: the loss of a network's logits with its penalties."""

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from etflight.network import Network
from etflight.penalties import center_pull, feature_penalty
from etflight.utils.errors import UserError, argument
from etflight.utils.ranks import in_process_group


def training_loss(network: Network, images: Tensor, target: Tensor) -> Tensor:
    """Compute the loss of a batch, with the penalties among the network's hyper-parameters `feature_penalty` and `center_pull`.

    Args:
        network: The network, whose backbone and head each take the batch once.
        images: The images `[B, C, H, W]`.
        target: The class indices `[B]`, int64, or probabilities `[B, K]`.

    Returns:
        A scalar.

    Raises:
        UserError: There are penalties that this network or these targets cannot have, or BatchNorm would see one number alone.
    """
    head, loss, given = network.head, network.loss, network.hparams
    if type(network).forward is not Network.forward:  # a subclass has logits of its own
        if given["feature_penalty"] or given["center_pull"]:
            raise UserError(
                f"{type(network).__name__} has a forward of its own: leave out feature_penalty and center_pull"
            )
        return cast(Tensor, loss(network(images), target))
    if given["center_pull"] and target.is_floating_point():
        mixes = f"{argument('data.mixup', 0)} and {argument('data.cutmix', 0)}"
        raise UserError(
            f"center_pull needs one class for each image, but mixup and CutMix mix them: give {mixes}, or leave it out"
        )
    try:
        features = network.features(images)
        embedding = head.embedder(features)
    except ValueError as error:
        if len(images) > 1 or isinstance(error, UserError):
            raise
        mend = f"give {argument('data.batch_size', 2)} or more"
        raise UserError(f"batch normalisation cannot train on a step of one image: {mend}") from error
    total = _loss_of_targets(head, loss, embedding, target)
    if given["feature_penalty"]:
        total = total + given["feature_penalty"] * feature_penalty(features)
    if given["center_pull"]:
        total = total + given["center_pull"] * center_pull(embedding, target, head.num_classes)
    return total


def _loss_of_targets(head: Any, loss: Any, embedding: Tensor, target: Tensor) -> Tensor:
    if target.is_floating_point() or not loss.takes_target_logits:
        return cast(Tensor, loss(head.logits(embedding), target))
    # the logits of all classes would cost hundreds of times as much at K = 100,000
    return cast(Tensor, loss.from_target_logits(head.target_logits(embedding, target), target, head.num_classes))


def share_of_images(images: int, like: Tensor) -> Tensor | float:
    """The number of images of this process, divided by its mean over processes: a collective call.

    It corrects the averaging of gradients over processes, which counts each process the same whatever the size of its batch.

    Args:
        images: The number of images of this process.
        like: A tensor with the device and at most the precision of the result.
    """
    if not in_process_group():
        return 1.0
    dtype = torch.promote_types(like.dtype, torch.float32)
    total = torch.full((), float(images), dtype=dtype, device=like.device)
    dist.all_reduce(total)
    return images * dist.get_world_size() / total
