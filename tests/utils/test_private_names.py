"""Names of other libraries that are not public: these tests say which one a release has moved."""

import pytest
from lightning.pytorch import LightningModule
from torchmetrics import Metric, SumMetric


@pytest.mark.parametrize("name", ["_sync_dist", "_reduce_states", "_apply", "_load_from_state_dict"])
def test_torchmetrics_has_the_hooks_that_exact_metric_overrides(name):
    assert callable(vars(Metric)[name])


@pytest.mark.parametrize("name", ["_defaults", "_computed", "_update_count"])
def test_torchmetrics_keeps_the_values_that_exact_metric_changes(name):
    assert name in vars(SumMetric())


def test_lightning_modules_have_the_hooks_before_a_batch_moves():
    assert callable(vars(LightningModule)["_on_before_batch_transfer"])
