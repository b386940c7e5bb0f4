"""The callback that gathers the table that `etflight predict` writes."""

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from etflight.analysis.predictions import check_output, skipped_beside, write
from etflight.classifier import Classifier
from etflight.data.sources import UNREADABLE
from etflight.runs.folder import writing_to
from etflight.utils.errors import UserError, argument, first_few, warn
from etflight.utils.files import write_csv
from etflight.utils.ranks import gather_objects
from etflight.utils.trainer import data_module, is_trial_run


class PredictionTable(Callback):
    """Writes images, classes and calibrated probabilities in the data's order, in the format of `etflight.analysis.predictions.write`.

    Images that could not be read are left out, counted, and listed with the reason in a file beside the table. There is no table if the
    probabilities of an image are NaN, which is a `UserError`: no class could be right.

    Args:
        path: The file.
        top_k: The number of classes for each image, the most probable first.
        embeddings: Whether to write the embeddings too.

    Raises:
        UserError: No image can be read, the model has fewer classes than `top_k`, or the file exists.
    """

    def __init__(self, path: Path, top_k: int = 1, embeddings: bool = False) -> None:
        self.path, self.top_k, self.embeddings = path, top_k, embeddings
        self._batches: list[tuple[Tensor, ...]] = []  # labels, probabilities, perhaps embeddings; on the CPU
        self._readable: list[bool] = []
        self._features: list[Tensor] = []
        self._hook: RemovableHandle | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the input of the head; by now the deciding head is in place."""
        head = cast(Classifier, pl_module).head
        if self.top_k > head.num_classes:
            raise UserError(
                f"{argument('top_k', self.top_k)}: the model has {head.num_classes} classes: give at most as many"
            )
        if self.embeddings:
            self._hook = head.register_forward_pre_hook(lambda _, args: self._features.append(args[0]))
        if trainer.is_global_zero and not is_trial_run(trainer):
            check_output(self.path)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the decisions; rank r of W sees images r, r + W, r + 2W and so on."""
        readable = batch[1] != UNREADABLE
        kept = list(outputs.float().topk(self.top_k, dim=1)[::-1])
        if self.embeddings:
            with torch.no_grad():
                kept.append(cast(Classifier, pl_module).head.embed(self._features.pop()).float())
        self._batches.append(tuple(part[readable].cpu() for part in kept))
        self._readable += readable.tolist()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows on the first process and write them."""
        if self._hook is not None:
            self._hook.remove()
        data, places = data_module(trainer), range(trainer.global_rank, 2**62, trainer.world_size)
        skipped = {i: _reason(data, i) for i, fine in zip(places, self._readable, strict=False) if not fine}
        indices = [i for i, fine in zip(places, self._readable, strict=False) if fine]
        ranks = gather_objects((indices, [torch.cat(parts) for parts in zip(*self._batches, strict=True)], skipped))
        skipped = {i: reason for _, _, part in ranks for i, reason in part.items()}
        if not any(indices for indices, _, _ in ranks):
            raise UserError(f"none of the {len(skipped)} images can be read: {skipped[min(skipped)]}")
        if not trainer.is_global_zero or is_trial_run(trainer):
            return
        columns = [torch.cat(parts) for parts in zip(*(parts for _, parts, _ in ranks if parts), strict=True)]
        order = np.argsort([i for indices, _, _ in ranks for i in indices])
        in_order = sorted(i for indices, _, _ in ranks for i in indices)
        labels, probabilities, *rest = (column[order].numpy() for column in columns)
        if len(broken := np.flatnonzero(~np.isfinite(probabilities).all(axis=1))):
            first = data.sample_name("test", in_order[broken[0]])
            raise UserError(
                f"{len(broken)} of {len(order)} images have probabilities that are NaN, the first is {first}: nothing is written; predict "
                f"in float32 ({argument('trainer.precision', '32-true')}), or with weights that have not diverged"
            )
        model = cast(Classifier, pl_module)
        images = [data.sample_name("test", i) for i in in_order]
        check_output(self.path)  # another process may have written it meanwhile
        with writing_to(self.path.parent, argument("output")):
            write(self.path, images, labels, probabilities, model.names_or_labels, *rest)
            rank_zero_info(f"predictions: {self.path} (probabilities: {model.describe_temperature()})")
            if skipped:
                self._tell_skipped({data.sample_name("test", i): skipped[i] for i in sorted(skipped)})

    def _tell_skipped(self, reasons: dict[str, str]) -> None:
        path = skipped_beside(self.path)
        write_csv(path, ["image", "reason"], reasons.items())
        count = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
        warn(f"{count} could not be read, listed in {path}: {first_few(reasons.values(), len(reasons), '; ')}")


def _reason(data: Any, index: int) -> str:
    """Find out why an image cannot be read, by reading it again; loader processes do not report reasons."""
    try:
        data.split("test").source.images(torch.tensor([index]))
    except UserError as error:
        return str(error)
    return f"{data.sample_name('test', index)} could not be read, but can be now"
