"""What a run leaves on disk: config.yaml and run.json of a training, predictions."""

from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from etflight import wandb_runs
from etflight.classifier import Classifier
from etflight.data.sources import UNREADABLE
from etflight.errors import UserError, warn
from etflight.files import write_csv, write_json
from etflight.predictions import Predictions, skipped_beside, write
from etflight.run_folder import RECORD, lock, same_folder, writing_to
from etflight.run_record import facts, facts_of_training, resumed_facts, training_facts


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml` and `run.json` into the run folder when training starts, or a test whose results have a folder of their own.

    W&B runs are told the same.

    Args:
        parser: that parsed the configuration.
        config: the parsed configuration.
        folder: the run folder.
        name: of the run.
        arm: that its configuration files stand for, or None.
        trained_in: the run folder of the checkpoint that is tested, or None; its seed and its images are those of the test, too.
    """

    def __init__(
        self,
        parser: LightningArgumentParser,
        config: Any,
        folder: Path,
        name: str,
        arm: str | None,
        trained_in: Path | None = None,
    ) -> None:
        super().__init__(parser, config, overwrite=True)
        self.folder, self.name, self.arm, self.trained_in = folder, name, arm, trained_in
        self._lock: IO[str] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write both, on the first process only.

        Raises:
            UserError: the folder cannot be written to, or another process trains in it.
        """
        if not trainer.is_global_zero:
            return
        if stage not in ("fit", "test"):
            return
        resolved = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        told = {**resolved, "arm": self.arm or self.name}  # by which W&B can group runs
        if stage == "fit":
            self._write(trainer, resolved, training_facts(seed=resolved["seed_everything"], data=_data(trainer)))
            wandb_runs.introduce(trainer, self.folder, told)
        else:
            beside = same_folder(self.folder, self.trained_in)
            if not beside:
                trained = {} if self.trained_in is None else facts_of_training(self.trained_in)
                self._write(trainer, resolved, {**trained, "checkpoint": resolved["ckpt_path"]})
            wandb_runs.introduce(trainer, self.folder, told, keeps_config=beside)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let W&B have the last checkpoint, if it was asked to; other callbacks have saved it by now."""
        if trainer.is_global_zero:
            wandb_runs.log_checkpoint(trainer, self.folder)

    def _write(self, trainer: Trainer, config: dict[str, Any], further: dict[str, Any]) -> None:
        record = {**facts(name=self.name, arm=self.arm, config=config, trainer=trainer), **further}
        if same_folder(self.folder, self.trained_in):
            record |= resumed_facts(self.folder, record)
        if (known := wandb_runs.recorded_id(self.folder)) is not None:
            record[wandb_runs.ID] = known
        with writing_to(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = self._lock or lock(self.folder)
            write_json(self.folder / RECORD, record)
            self.parser.save(self.config, self.folder / "config.yaml", skip_none=False, overwrite=True, multifile=False)


class PredictionTable(Callback):
    """Writes what `etflight.predictions.write` describes: image, classes and calibrated probabilities, in the data's order.

    What could not be read is left out, counted, and listed with the reason in a file beside it.

    Args:
        path: the file.
        top_k: how many classes of each image, the most probable first.
        embeddings: whether with the embeddings, too.

    Raises:
        UserError: no image can be read, or the model has fewer classes than `top_k`.
    """

    def __init__(self, path: Path, top_k: int = 1, embeddings: bool = False) -> None:
        self.path, self.top_k, self.embeddings = path, top_k, embeddings
        self._batches: list[tuple[Tensor, ...]] = []  # labels, probabilities, perhaps embeddings; on the CPU
        self._readable: list[bool] = []
        self._features: list[Tensor] = []
        self._hook: RemovableHandle | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to what the head is given; by now it is the one that decides."""
        head = cast(Classifier, pl_module).head
        if self.top_k > head.num_classes:
            raise UserError(f"--top_k {self.top_k}: the model has {head.num_classes} classes: give at most as many")
        if self.embeddings:
            self._hook = head.register_forward_pre_hook(lambda _, args: self._features.append(args[0]))

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
        data, places = _data(trainer), range(trainer.global_rank, 2**62, trainer.world_size)
        skipped = {i: _reason(data, i) for i, fine in zip(places, self._readable, strict=False) if not fine}
        indices = [i for i, fine in zip(places, self._readable, strict=False) if fine]
        own = (indices, [torch.cat(parts) for parts in zip(*self._batches, strict=True)], skipped)
        ranks = [own]
        if trainer.world_size > 1:
            ranks = [own] * trainer.world_size
            dist.all_gather_object(ranks, own)
        skipped = {i: reason for _, _, part in ranks for i, reason in part.items()}
        if not any(indices for indices, _, _ in ranks):
            raise UserError(f"none of the {len(skipped)} images can be read: {skipped[min(skipped)]}")
        if not trainer.is_global_zero:
            return
        columns = [torch.cat(parts) for parts in zip(*(parts for _, parts, _ in ranks if parts), strict=True)]
        order = np.argsort([i for indices, _, _ in ranks for i in indices])
        in_order = sorted(i for indices, _, _ in ranks for i in indices)
        labels, probabilities, *rest = (column[order].numpy() for column in columns)
        model = cast(Classifier, pl_module)
        names = model.class_names or [str(k) for k in range(data.num_classes)]
        images = [data.sample_name("test", i) for i in in_order]
        with writing_to(self.path.parent, "--output"):
            write(self.path, Predictions(images, labels, probabilities, rest[0] if rest else None), names)
            rank_zero_info(f"predictions: {self.path} ({_of_probabilities(model)})")
            self._tell_skipped({data.sample_name("test", i): skipped[i] for i in sorted(skipped)})

    def _tell_skipped(self, reasons: dict[str, str]) -> None:
        path = skipped_beside(self.path)
        path.unlink(missing_ok=True)  # of an earlier run, whose predictions have just been replaced
        if reasons:
            write_csv(path, ["image", "reason"], reasons.items())
            count = "1 image" if len(reasons) == 1 else f"{len(reasons)} images"
            more = f" and {len(reasons) - 3} more" if len(reasons) > 3 else ""
            warn(f"{count} could not be read, listed in {path}: {'; '.join(list(reasons.values())[:3])}{more}")


def _of_probabilities(model: Classifier) -> str:
    if model.is_calibrated:
        return f"probabilities calibrated with temperature {float(model.temperature):.3g}"
    return "probabilities not calibrated, since no temperature was fitted: see --data.val_fraction"


def _reason(data: Any, index: int) -> str:
    """Why an image cannot be read: it is tried once more, as loader processes tell no reasons."""
    try:
        data.split("test").source.images(torch.tensor([index]))
    except UserError as error:
        return str(error)
    return f"{data.sample_name('test', index)} could not be read, but can be now"


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning outside the class body
