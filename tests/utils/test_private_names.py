"""Names of other libraries that are not public: these tests say which one a release has moved."""

import warnings
from types import SimpleNamespace

import pytest
from lightning.fabric.strategies.launchers import subprocess_script
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import _pytree
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric, SumMetric

from etflight.utils.lightning_private import (
    forks_processes,
    ignore_own_deprecations,
    leave_out_anonymous,
    on_dead_process,
    replace_hyperparameters,
)
from etflight.utils.torch_private import broadcast_buffers, leave_out_of_broadcasts


def test_torchmetrics_has_the_hooks_and_values_that_exact_metric_overrides_and_changes():
    assert {"_sync_dist", "_reduce_states", "_wrap_update", "_apply", "_load_from_state_dict"} <= vars(Metric).keys()
    assert {"_defaults", "_computed", "_update_count"} <= vars(SumMetric()).keys()


def test_torch_ddp_leaves_the_named_buffers_of_a_module_alone():
    model = nn.BatchNorm1d(3)
    leave_out_of_broadcasts(model, ["running_mean", "num_batches_tracked"])
    assert [id(buffer) for buffer in broadcast_buffers(model)] == [id(model.running_var)]


def test_lightning_calls_what_torch_has_deprecated_from_its_pytree():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _pytree._tree_flatten(0)
        assert len(told) == 1
        ignore_own_deprecations()
        _pytree._tree_flatten(0)
        assert len(told) == 1


class StatefulLoader(DataLoader):
    """One that has a state."""

    def state_dict(self):
        return {"served": 1}

    def load_state_dict(self, state_dict):
        pass


class SeesLoops(BoringModel):
    """Looks at the loops' state when its third step has begun."""

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx == 2:
            self.loops = self.trainer.fit_loop.state_dict()


def test_lightning_keeps_the_counters_that_a_checkpoint_sets_back():
    model = SeesLoops()
    trainer = Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )  # fmt: skip
    trainer.fit(model, StatefulLoader(RandomDataset(32, 4), batch_size=1))
    batches, epochs = model.loops["epoch_loop.batch_progress"], model.loops["epoch_progress"]
    assert (batches["total"]["ready"], batches["current"]["ready"], batches["current"]["completed"]) == (3, 3, 2)
    assert (epochs["total"]["ready"], epochs["current"]["ready"], epochs["current"]["completed"]) == (1, 1, 0)
    assert batches["is_last_batch"] is False
    assert model.loops["state_dict"]["combined_loader"] == [{"served": 1}]
    assert trainer.fit_loop.total_batch_idx == 2
    assert trainer.fit_loop.restarted_mid_epoch is False
    assert callable(trainer.fit_loop.setup_data)


def test_lightnings_launcher_logs_a_dead_process_as_it_did(monkeypatch):
    told = []
    monkeypatch.setattr(subprocess_script._logger, "filters", [])
    monkeypatch.setattr(subprocess_script._logger, "disabled", False)
    subprocess_script._logger.setLevel("INFO")
    on_dead_process(lambda rank, status: told.append((rank, status)))
    dead = SimpleNamespace(returncode=-9, pid=1, poll=lambda: None)
    observer = subprocess_script._ChildProcessObserver(1, [dead])
    monkeypatch.setattr(observer, "_terminate_all", lambda: None)
    observer._run()
    assert told == [(1, -9)]


def test_lightnings_modules_ddp_strategy_keep_hooks_and_options():
    assert WeightAveraging()._average_model is None
    assert callable(WeightAveraging._swap_models)
    assert DDPStrategy(find_unused_parameters=False)._ddp_kwargs == {"find_unused_parameters": False}
    assert DummyLogger().experiment.anything("else") is None


@pytest.mark.parametrize(("strategy", "forks"), [("ddp", False), ("ddp_spawn", True)])
def test_lightning_tells_by_the_class_of_the_launcher_how_processes_start(strategy, forks):
    trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_progress_bar=False)
    assert forks_processes(trainer.strategy) == forks


def test_lightning_gives_wandb_an_anonymous_setting_that_can_be_left_out(tmp_path):
    for given, kept in ((None, False), (True, True)):
        logger = WandbLogger(offline=True, save_dir=tmp_path, anonymous=given)
        assert "anonymous" in logger._wandb_init
        leave_out_anonymous(logger)
        assert ("anonymous" in logger._wandb_init) == kept


def test_lightning_gives_loggers_the_hyperparameters_that_replace_others():
    model = BoringModel()
    model.save_hyperparameters({"old": 1})
    replace_hyperparameters(model, {"new": 2})
    assert model.hparams == model.hparams_initial == {"new": 2}
    assert model.hparams.new == 2
