"""Neural collapse, measured while a model trains."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from etflight.analysis.features import HEAD, EmbeddingSource, Space
from etflight.analysis.sweep import (
    KEEP_BYTES,
    KeptEmbeddings,
    PassStatistics,
    class_indices,
    every_sample_once,
    plain_tensors,
    trainer_sweep,
)
from etflight.callbacks.collapse_record import History, share_over_ranks, write_arrays, write_gram
from etflight.callbacks.sweep_rhythm import SweepRhythm, epochs_trained
from etflight.metrics import Moments, measures
from etflight.utils.errors import UserError
from etflight.utils.trainer import averaged, callbacks_of, data_module, is_trial_run


class NeuralCollapseMonitor(Callback):
    """Measures neural collapse each epoch: `nc/train/nc1`, `nc/train/alignment`, …, `nc/val/nc4`.

    The names after `nc/<split>/` are `nc4` and those of `measures.summary`, where a standard deviation has the suffix `_std`. An undefined
    value is NaN; `missing_classes` and `single_sample_classes` count the classes that make it so. The values are in
    `trainer.callback_metrics`, in every logger, and in `history` in full precision.

    - **train**: one extra forward over the training set, each sample exactly once on any number of processes, in evaluation mode, not
      augmented and not re-sampled: just before validation, or at the end of an epoch without one. `limit_train_batches` limits the
      training, not this sweep (`fast_dev_run` limits both). Validation within an epoch is measured too, and so are the final weights
      of a training that does not end with a measured epoch.
    - **val**: the validation loop's own forward (of its first loader), no extra one. `nc/val/nc4` compares with the centres of the sweep.
    - **online**: the training forwards themselves, no sweep: `nc/train_online/…`. These embeddings are *stale*, each from the weights
      of its step, with the batch's BatchNorm and augmentation; batches whose labels are probabilities (mixup) are left out. While it is
      measured, the head computes the logits of all classes, although dot regression alone would need only those of the targets.
    - before the first step: a sweep, logged at step 0.

    Under `WeightAveraging` (EMA) the averaged weights are measured, wherever that callback stands in the list; `online` is the exception
    and sees the current ones. On several processes the sweep runs the model itself, without DDP, with
    rank 0's buffers. Models whose parameters are sharded are not supported.

    Each sweep of the embedding leaves `<run folder>/gram/epoch_XXX.npz`, where XXX counts finished epochs: `classes` `[n]`, all of them or
    100 evenly chosen ones, and `gram` `[2n + 1, 2n + 1]` float32, the inner products of their means, their class vectors and the mean of
    all class means. The cosines of any heat map follow from these.

    Args:
        every_n_epochs: Measure epochs n, 2n, …, and the last. "auto" measures every epoch, which adds about a quarter to its time, and
            as much as the epoch itself where the backbone is frozen or reading the images takes most of the time. If the training images
            are many or large (100 million pixels), all sweeps together, those before and after the training too, take at most one image
            for twelve that train, which adds less than a tenth to a training that goes on to its last epoch: none if that has fewer than
            twelve. The validation images are measured whenever they are validated.
        splits: One or both of "train" and "val".
        space: "embedding" measures the vectors that are compared with the class vectors: `head.embed(features)` for an `etflight.Head`,
            the input for any other module. "backbone" measures the head's input, under `nc_raw/…`; for an `etflight.Head` without the
            measures that need class vectors.
        head: The name of the submodule with `weight` `[K, d]`, and perhaps `bias`.
        train_dataloader: A loader whose data set the sweep reads in order, in batches of the same size; None takes
            `eval_dataloader("train")` of the data module. Its batches are `(inputs, labels, …)`; `model(inputs)` runs the head.
        online: Whether to measure the training forwards instead of a sweep.
        layers: The names of further submodules, of the model or of its backbone ("layer1"), averaged over places and logged as
            `nc_<layer>/…`, without class vectors.
        snapshots: The number of embeddings kept per class and sweep, the first of each class in the data's order, float16, in
            `<run folder>/snapshots/epoch_XXX.npz` (`snapshots_raw/` for the backbone) with `labels`, `indices`, `epoch` and `weight`;
            XXX counts finished epochs.
        before_training: Whether to sweep before the first step.
        spectra: Whether to measure `effective_rank` and `effective_rank_within`, whose eigenvalues cost O(d³).

    Attributes:
        latest: The last class statistics by split ("train", "val", "train_online"), on the CPU.
        weight_of: The class vectors `[K, d]` with which `latest` was measured, by split.
        latest_weight: The class vectors `[K, d]` of the last measurement, on the CPU.
        latest_bias: The biases `[K]`, or None.

    Raises:
        UserError: An option is invalid, the model has no such head or layer, or the training images cannot be reached.

    Example:
        In any LightningModule whose `forward(images)` goes through `self.fc`:

        >>> from etflight.callbacks import NeuralCollapseMonitor
        >>> monitor = NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader([(torch.zeros(3), 0)]))
        >>> trainer = Trainer(callbacks=[monitor], accelerator="cpu", logger=False, enable_checkpointing=False)

        In a plain PyTorch loop, `etflight.metrics` has the statistics and the measures.
    """

    def __init__(
        self,
        every_n_epochs: int | Literal["auto"] = 1,
        splits: Sequence[Literal["train", "val"]] = ("train", "val"),
        space: Space = "embedding",
        head: str = "head",
        train_dataloader: DataLoader | None = None,  # type: ignore[type-arg]  # the command line's parser takes no generics here
        online: bool = False,
        layers: Sequence[str] = (),
        snapshots: int = 0,
        before_training: bool = True,
        spectra: bool = True,
    ) -> None:
        super().__init__()
        self.every_n_epochs = every_n_epochs
        self.splits = tuple(splits)
        self.space = space
        self.head = head
        self.train_dataloader = train_dataloader
        self.online = online
        self.layers = tuple(layers)
        self.snapshots = snapshots
        self.before_training = before_training
        self.spectra = spectra
        for name, holds, rule in (
            ("splits", len(splits) > 0 and set(splits) <= {"train", "val"}, 'give "train", "val", or both'),
            ("space", space in ("embedding", "backbone"), 'give "embedding" or "backbone"'),
            ("snapshots", snapshots >= 0, "give 0 (none) or more per class"),
            (
                "snapshots",
                not snapshots or ("train" in splits and not online),
                'they are taken from the sweep over the training images: give "train" among splits, and no online',
            ),
        ):
            if not holds:
                raise UserError(f"NeuralCollapseMonitor: {name} is {getattr(self, name)!r}: {rule}")

        self.latest: dict[str, Moments] = {}
        self.latest_weight: Tensor | None = None
        self.latest_bias: Tensor | None = None
        self.weight_of: dict[str, Tensor | None] = {}

        self._anchors: dict[str, Tensor] = {}
        self._record = History()
        self._rhythm = SweepRhythm(every_n_epochs, before_training)
        self._swept_at = -1.0
        self._source: EmbeddingSource | None = None
        self._loader: DataLoader[Any] | None = None
        self._online: PassStatistics | None = None
        self._online_states: list[dict[str, Any]] = []
        self._val: PassStatistics | None = None
        self._is_ready = True  # whether the next validation batch needs no preparation

    @property
    def epochs(self) -> list[float]:
        """The number of finished epochs at each measurement, 0 before training; a fraction within an epoch."""
        return self._record.epochs

    @property
    def history(self) -> dict[str, list[float]]:
        """The values at `epochs` by log name, NaN if not measured. Checkpoints hold it, and the anchors."""
        return self._record.series

    @property
    def prefix(self) -> str:
        """The first part of the log names of the head's measures."""
        return "nc" if self.space == "embedding" else "nc_raw"

    # --- when --------------------------------------------------------------------------------------------------------------

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the head, the layers and the training images, or raise an error that says what is missing."""
        self._source = EmbeddingSource(pl_module, self.head, self.space, self.layers)
        self._loader = self._val = self._online = None
        self._rhythm.start()
        if averaging := callbacks_of(trainer, WeightAveraging):
            rank_zero_info(f"neural collapse is measured with the averaged weights of {type(averaging[0]).__name__}")
        for other in callbacks_of(trainer, NeuralCollapseMonitor):
            if other.head != self.head and self._logged() & other._logged():
                raise UserError(
                    f"two NeuralCollapseMonitors would log the heads {self.head} and {other.head} under the same names: "
                    "measure one head in a training"
                )
        if not self._sweeps:
            return
        if self.train_dataloader is None and not hasattr(data_module(trainer), "eval_dataloader"):
            raise UserError(
                "NeuralCollapseMonitor needs the training images without augmentation: give train_dataloader=, or a data "
                'module with eval_dataloader("train")'
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the untrained model, at step 0."""
        if self._sweeps and self._rhythm.decide(trainer) and trainer.global_step == 0:
            self._sweep(trainer, pl_module, 0.0)
            self._record.log_outside_of_epochs(trainer, 0.0, epoch=trainer.current_epoch, step=0)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare a sweep, which waits for the first batch, because by then every callback has put its weights into the model."""
        self._val = None
        self._is_ready = True
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        due = self._rhythm.is_due(trainer)
        if "val" in self.splits and (due or self.every_n_epochs == "auto"):
            self._val = self._new_pass(trainer, "val")
        self._is_ready = not due and self._val is None

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Sweep before the first batch, then catch the validation loop's own forward."""
        if not self._is_ready:
            self._before_validation(trainer, pl_module)
        if self._val is not None and dataloader_idx == 0:
            self._required_source().attach()

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        if self._val is None or dataloader_idx != 0:
            return
        labels = class_indices(batch)
        self._val.add(self._required_source().take(len(labels)), labels)
        self._required_source().detach()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the sweep and the validation pass."""
        if not self._is_ready:  # this process saw no validation batch
            self._before_validation(trainer, pl_module)
        if self._val is not None:
            with plain_tensors():
                self._finish(self._val, "val")
                if self._val.centres is not None:
                    self._record.pending[f"{self._group(HEAD)}/val/nc4"] = share_over_ranks(trainer, self._val.agrees)
            self._val = None
        self._log(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Catch the training forward."""
        if self.online and "train" in self.splits and self._rhythm.is_due(trainer):
            if self._online is None:
                self._online = self._new_pass(trainer, "train_online")
                for state in self._online_states:
                    self._online.add_state(state)
                self._online_states = []
            self._required_source().attach()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Catch no more: what follows in this step, such as the second pass of a sharpness-aware one, is of other weights."""
        if self._online is not None:
            self._required_source().stop()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch."""
        if self._online is None:
            return
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
        if isinstance(labels, Tensor) and labels.ndim > 1:
            # Python shows the same warning once
            rank_zero_warn("online neural-collapse statistics leave out batches whose labels are probabilities (mixup)")
        else:
            labels = class_indices(batch)
            self._online.add(self._required_source().take(len(labels)), labels)
        self._required_source().detach()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the online pass, and sweep if no validation of this epoch did."""
        if self._online is not None:
            passed, self._online = self._online, None
            if passed.statistics:
                self._remember_weights()
                with plain_tensors():
                    self._finish(passed, "train_online")
        elif self._sweeps and self._rhythm.is_due(trainer) and self._swept_at <= trainer.current_epoch:
            with averaged(trainer, pl_module):
                self._sweep(trainer, pl_module, epochs_trained(trainer))
        self._log(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the final weights, unless another callback has asked for it."""
        self.measure_final_weights(trainer, pl_module)

    def measure_final_weights(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights of a training that ends, unless they have been measured; callbacks ask for it before they save or draw.

        A training may end within an epoch, or after an epoch that was not due.
        """
        epochs = (
            epochs_trained(trainer) - 1
        )  # Lightning has counted the last one as completed, even if it was cut short
        if self._sweeps and self._rhythm.sweeps_at_the_end and self._swept_at < epochs:
            with averaged(trainer, pl_module):
                self._sweep(trainer, pl_module, epochs)
            self._record.log_outside_of_epochs(
                trainer, epochs, epoch=trainer.current_epoch - 1, step=trainer.global_step - 1
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind."""
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let go of the model and of the loader's workers."""
        self._release()
        self._source = self._loader = None

    def _release(self) -> None:
        if self._source is not None:
            self._source.detach()
        self._val = self._online = None
        self._is_ready = True
        self._record.pending = {}
        self._swept_at = -1.0

    @property
    def _sweeps(self) -> bool:
        return "train" in self.splits and not self.online

    # --- what --------------------------------------------------------------------------------------------------------------

    def _before_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_ready = True
        if self._sweeps and self._rhythm.is_due(trainer):
            centres = self._sweep(trainer, pl_module, epochs_trained(trainer))
            if self._val is not None:
                self._val.centres = measures.Centres.of(centres)
        else:
            self._remember_weights()

    def _sweep(self, trainer: Trainer, pl_module: LightningModule, epoch: float) -> Moments:
        """Sweep over the training images, and return the statistics of the embedding, on the device."""
        self._swept_at = epoch
        source, passed = self._required_source(), self._new_pass(trainer, "train")
        limit = int(trainer.num_training_batches) if is_trial_run(trainer) else None
        kept = KeptEmbeddings(trainer.global_rank, trainer.world_size, self.snapshots)
        self._remember_weights()
        trainer_sweep(trainer, pl_module, self._training_images(trainer), source, passed, kept.add, limit)
        with plain_tensors():
            moments = self._finish(passed, "train")
            share, name = share_over_ranks(trainer, kept.agrees(moments)), f"{self._group(HEAD)}/train/nc4"
            if math.isnan(share):
                most = f"{KEEP_BYTES / 2**30:g} GiB"
                rank_zero_warn(f"{name} is left out: embeddings take more than {most}, or the model decides nothing")
            else:
                self._record.pending[name] = share
            if limit is None and epoch == int(epoch):
                assert self.latest_weight is not None
                if self.space == "embedding":
                    write_gram(trainer, int(epoch), moments.means, self.latest_weight)
                if self.snapshots:
                    folder, weight = self.prefix.replace("nc", "snapshots"), self.latest_weight.float().numpy()
                    write_arrays(trainer, folder, int(epoch), **kept.snapshot(trainer), weight=weight)
        return moments

    def _new_pass(self, trainer: Trainer, split: str) -> PassStatistics:
        device = trainer.strategy.root_device
        anchors = {
            key.removeprefix(f"{split}/"): value for key, value in self._anchors.items() if key.startswith(f"{split}/")
        }
        return PassStatistics(self._required_source().num_classes, device, anchors)

    def _finish(self, passed: PassStatistics, split: str) -> Moments:
        """Compute over all ranks, and keep values, statistics and anchors."""
        source = self._required_source()
        computed = passed.compute()
        for name, moments in computed.items():
            meets = name == HEAD and source.meets_weight
            weight, bias = (self.latest_weight, self.latest_bias) if meets else (None, None)
            weight = None if weight is None else weight.to(moments.means.device)
            scalars = measures.summary(moments, weight, bias, spectra=self.spectra)
            numbers = torch.stack(list(scalars.values())).tolist()  # one wait for the device
            self._record.pending |= {
                f"{self._group(name)}/{split}/{key}": value for key, value in zip(scalars, numbers, strict=True)
            }
            self._anchors[f"{split}/{name}"] = moments.means.to("cpu", torch.float32)
            if name == HEAD:
                self.latest[split], self.weight_of[split] = moments.to("cpu"), self.latest_weight
        return computed[HEAD]

    def _logged(self) -> set[str]:
        """The first parts of the names under which the head's measures are logged."""
        own = {"train": "train_online"} if self.online else {}
        return {f"{self.prefix}/{own.get(split, split)}" for split in self.splits}

    def _group(self, name: str) -> str:
        return self.prefix if name == HEAD else f"nc_{name}"

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._record.pending:
            pl_module.log_dict(self._record.close(epochs_trained(trainer)), sync_dist=True)

    def _remember_weights(self) -> None:
        """Keep the class vectors that are measured."""
        source = self._required_source()
        with plain_tensors():
            self.latest_weight = source.weight.cpu().clone()
            self.latest_bias = None if source.bias is None else source.bias.cpu().clone()

    def _required_source(self) -> EmbeddingSource:
        assert self._source is not None
        return self._source

    def _training_images(self, trainer: Trainer) -> DataLoader[Any]:
        if self._loader is None:
            if self.train_dataloader is None:
                self._loader = data_module(trainer).eval_dataloader("train")
            else:
                self._loader = every_sample_once(self.train_dataloader, trainer.world_size, trainer.global_rank)
        return self._loader

    # --- checkpoints -------------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """The key of the state in checkpoints, which distinguishes several monitors of one run."""
        options = {"space": self.space, "head": self.head, "online": self.online}
        return f"{type(self).__qualname__}{options!r}"

    def state_dict(self) -> dict[str, Any]:
        """Return history and anchors as plain data and tensors."""
        return {**self._record.state_dict(), "anchors": dict(self._anchors), "swept_at": self._swept_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history."""
        self._record.load_state_dict(state_dict)
        self._anchors = dict(state_dict["anchors"])
        self._swept_at = state_dict["swept_at"]

    def rank_state(self) -> dict[str, Any]:
        """Return this process's statistics of the training forwards in this epoch so far."""
        passed = self._online
        return {} if passed is None else {name: metric.metric_state for name, metric in passed.statistics.items()}

    def load_rank_states(self, states: list[dict[str, Any]]) -> None:
        """Continue from the statistics of one process, or from the sum of several."""
        self._online_states = [state for state in states if state]
