"""Names of other libraries that are not public: these tests say which one a release has moved."""

import warnings

import pytest
from torch import nn
from torchmetrics import Metric, SumMetric

from etflight.utils.lightning_private import ignore_own_deprecations
from etflight.utils.torch_private import broadcast_buffers, is_watched, leave_out_of_broadcasts


@pytest.mark.parametrize("name", ["_sync_dist", "_reduce_states", "_apply", "_load_from_state_dict"])
def test_torchmetrics_has_the_hooks_that_exact_metric_overrides(name):
    assert callable(vars(Metric)[name])


@pytest.mark.parametrize("name", ["_defaults", "_computed", "_update_count"])
def test_torchmetrics_keeps_the_values_that_exact_metric_changes(name):
    assert name in vars(SumMetric())


def test_torch_ddp_leaves_the_named_buffers_of_a_module_alone():
    model = nn.BatchNorm1d(3)
    leave_out_of_broadcasts(model, ["running_mean", "num_batches_tracked"])
    assert [id(buffer) for buffer in broadcast_buffers(model)] == [id(model.running_var)]


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_torch_keeps_the_hooks_of_a_module_where_is_watched_looks(register):
    model = nn.Linear(1, 1)
    assert not is_watched(model)
    getattr(model, register)(lambda *_: None)
    assert is_watched(model)


def test_lightning_calls_what_torch_has_deprecated_from_its_pytree():
    from lightning.pytorch.utilities import _pytree

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _pytree._tree_flatten(0)
        assert len(told) == 1
        ignore_own_deprecations()
        _pytree._tree_flatten(0)
        assert len(told) == 1
