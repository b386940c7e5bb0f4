"""What a run leaves on disk: config.yaml and run.json of a training, predictions.csv."""

from pathlib import Path
from typing import IO, Any, cast

import torch.distributed as dist
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_info

from etflight import wandb_runs
from etflight.classifier import Classifier
from etflight.run import (
    RECORD,
    facts,
    facts_of_training,
    lock,
    resumed_facts,
    same_folder,
    training_facts,
    write_csv,
    write_json,
    writing_to,
)


class RunRecord(SaveConfigCallback):
    """Writes `config.yaml` and `run.json` into the run folder when training starts, or a test whose results have a folder of their own.

    W&B runs are told the same.

    Args:
        parser: that parsed the configuration.
        config: the parsed configuration.
        folder: the run folder.
        name: of the run.
        arm: stem of the configuration file, or None.
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
        resolved = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        told = {**resolved, "arm": self.arm or self.name}  # by which W&B can group runs
        if stage == "fit":
            self._write(trainer, resolved, training_facts(seed=resolved["seed_everything"], data=_data(trainer)))
            wandb_runs.introduce(trainer, self.folder, told)
        elif stage == "test":
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
    """Writes `predictions.csv`: index or path, class and calibrated probability of every image, in the data's order.

    Args:
        folder: where.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._rows: list[tuple[int, int, float]] = []

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the decision of each image; rank r of W sees images r, r + W, r + 2W and so on."""
        probability, label = outputs.max(dim=1)
        start = len(self._rows)
        for i, (p, k) in enumerate(zip(probability.tolist(), label.tolist(), strict=True), start=start):
            self._rows.append((trainer.global_rank + i * trainer.world_size, k, p))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows on the first process and write them."""
        parts = [self._rows]
        if trainer.world_size > 1:
            parts = [[] for _ in range(trainer.world_size)]
            dist.all_gather_object(parts, self._rows)
        if not trainer.is_global_zero:
            return
        data = _data(trainer)
        names = cast(Classifier, pl_module).class_names
        rows = [
            (data.sample_name("test", index), names[k] if names else k, f"{p:.6f}")
            for index, k, p in sorted(row for part in parts for row in part)
        ]
        with writing_to(self.folder):
            write_csv(self.folder / "predictions.csv", ["image", "class", "probability"], rows)
        rank_zero_info(f"predictions: {self.folder / 'predictions.csv'}")


def _data(trainer: Trainer) -> Any:
    return trainer.datamodule  # type: ignore[attr-defined]  # set by Lightning outside the class body
