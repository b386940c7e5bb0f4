"""Under averaged weights, whatever was fitted or measured at a validation belongs to the weights that were validated and saved."""

import math
from functools import partial

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging
from scipy.optimize import minimize_scalar
from torch import nn

from etflight import Classifier, ETFHead, callbacks
from etflight.callbacks import ExponentialMovingAverage, StochasticWeightAverage
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from etflight.utils.errors import UserError
from tests.metrics import oracle
from tests.training import new_trainer, seen
from tests.training import small_resnet as small


def fitted(tmp_path, ema, ema_first):
    torch.manual_seed(0)
    data = Digits(max_count=20, val_fraction=0.3, batch_size=32)
    last = callbacks.LastCheckpoint()
    watch, raw = callbacks.NeuralCollapseMonitor(), callbacks.NeuralCollapseMonitor(space="backbone")
    ours = [
        callbacks.StopSignals(last), last, callbacks.FineTuning(freeze=["layer1"], unfreeze_epoch=1), watch, raw,
        callbacks.CollapseFigures(every_n_epochs=2), callbacks.DeferredBalance(epoch=1, class_balance="batch"),
    ]  # fmt: skip
    order = [ema, *ours] if ema_first else [*ours, ema]
    trainer = new_trainer(*order, max_epochs=2, logger=MetricsCSV(tmp_path), default_root_dir=tmp_path)
    model = small()
    trainer.fit(model, datamodule=data)
    return data, trainer, model, watch, raw


def nc1(h, y):
    return oracle.nc1(oracle.two_pass(h.double(), y, 10))


@pytest.mark.parametrize("average", [EMAWeightAveraging, ExponentialMovingAverage])
def test_the_checkpoint_has_the_temperature_and_the_numbers_of_its_own_weights(tmp_path, average):
    data, trainer, trained, watch, raw = fitted(tmp_path, average(decay=0.9), average is EMAWeightAveraging)
    model = Classifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    model.eval()
    data.trainer = None
    features, embeddings, logits, labels = seen(data, "val", model.features, model.embed, model)

    def loss(log_t):
        return torch.nn.functional.cross_entropy(logits / math.exp(log_t), labels).item()

    best = math.exp(minimize_scalar(loss, bounds=(math.log(0.002), math.log(100)), method="bounded").x)
    assert float(model.temperature) == pytest.approx(best, rel=0.02)
    assert float(trained.temperature) == float(model.temperature)  # the model that training leaves in memory
    logged = trainer.callback_metrics
    assert float(logged["val/acc"]) == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    expected = 0.5 * ((logits.gather(1, labels[:, None]) - 1) ** 2).mean().item()
    assert float(logged["val/loss"]) == pytest.approx(expected, rel=1e-4)
    assert watch.history["nc/val/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)
    assert raw.history["nc_raw/val/nc1"][-1] == pytest.approx(nc1(features, labels), rel=1e-3)
    embeddings, labels = seen(data, "train", model.embed)
    assert watch.history["nc/train/nc1"][-1] == pytest.approx(nc1(embeddings, labels), rel=1e-4)


class States(Callback):
    """Keeps the weights and buffers after every step."""

    def __init__(self):
        self.after = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def test_weights_and_running_statistics_are_averaged_and_what_is_constant_stays(tmp_path):
    torch.manual_seed(0)
    states, last = States(), callbacks.LastCheckpoint()
    callbacks_of_it, options = (states, last, ExponentialMovingAverage(0.8)), {"max_epochs": 2, "limit_val_batches": 0}
    new_trainer(*callbacks_of_it, default_root_dir=tmp_path, **options).fit(small(), datamodule=Digits(max_count=20))
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert len(states.after) > 3
    moved = 0
    for name, first in states.after[0].items():
        expected = first.double()
        for state in states.after[1:]:
            expected = 0.8 * expected + 0.2 * state[name].double()
        if all(torch.equal(first, state[name]) for state in states.after):
            assert torch.equal(saved[name], first), name
        elif first.is_floating_point():
            torch.testing.assert_close(saved[name].double(), expected, rtol=1e-4, atol=1e-6, msg=name)
            moved += not torch.allclose(saved[name], states.after[-1][name], rtol=1e-3)
        else:
            assert torch.equal(saved[name], states.after[-1][name]), name
    assert moved > 50
    assert torch.equal(saved["head.weight"], states.after[0]["head.weight"])


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_that_averages_nothing_is_refused(decay):
    with pytest.raises(UserError, match=r"decay of the moving average is .*: give a number from 0"):
        ExponentialMovingAverage(decay)


def test_each_training_has_an_average_of_its_own(tmp_path):
    ema, data = ExponentialMovingAverage(0.5), Digits(max_count=20, batch_size=32)
    models = [small() for _ in range(2)]
    for model in models:
        before = model.backbone.conv1.weight.clone()
        trainer = new_trainer(ema, max_epochs=1)
        trainer.fit(model, datamodule=data)
        assert (model.backbone.conv1.weight - before).abs().max() > 1e-3
    other = small().eval()
    (metrics,) = trainer.validate(other, datamodule=data, verbose=False)
    logits, labels = seen(data, "val", other)
    assert metrics["val/acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())


def test_an_average_is_in_double_precision_with_the_weights_and_refused_in_half():
    model, states = small(), States()
    options = {"max_epochs": 1, "limit_val_batches": 0, "limit_train_batches": 2}
    new_trainer(states, ExponentialMovingAverage(0.8), precision="64-true", **options).fit(model, Digits(batch_size=32))
    first, second = (state["backbone.conv1.weight"] for state in states.after)
    torch.testing.assert_close(model.backbone.conv1.weight.detach(), 0.8 * first + 0.2 * second, rtol=1e-14, atol=0)
    with pytest.raises(UserError, match=r"needs weights in float32: give precision='bf16-mixed'"):
        new_trainer(ExponentialMovingAverage(), precision="bf16-true", **options).fit(small(), Digits())


# --- the mean over the last epochs -------------------------------------------------------------------------------------

SWA = {"swa_lrs": 0.05, "swa_epoch_start": 3, "annealing_epochs": 1}  # epochs 3, 4 and 5 of 5
STEPS = 2  # of an epoch


class Images(Callback):
    """Keeps the images of each step."""

    def __init__(self):
        self.of = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.of.append(batch[0])


def averaged_run(tmp_path, average, *others, sam_rho=0.0, head=ETFHead, **options):
    """Five epochs; returns the states after each step, the images of each, the trainer, the data and the saved state."""
    torch.manual_seed(0)
    states, images, data = States(), Images(), Digits(max_count=20, batch_size=100, val_fraction=0.2, crop_padding=0)
    trainer = new_trainer(
        states, average, callbacks.LastCheckpoint(), images, *others, default_root_dir=tmp_path,
        **{"max_epochs": 5, **options},
    )  # fmt: skip
    model = small(sam_rho=sam_rho, head=head)
    trainer.fit(model, datamodule=data)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    return states.after, images.of, trainer, data, saved


def assert_mean_of(saved, states):
    for name, _ in small().named_parameters():
        mean = sum(state[name].double() for state in states) / len(states)
        torch.testing.assert_close(saved["state_dict"][name].double(), mean, rtol=1e-6, atol=1e-7, msg=name)


RHYTHMS = [
    {}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 2}, {"val_check_interval": 1}, {"accumulate_grad_batches": 2},
]  # fmt: skip


@pytest.mark.parametrize("sam_rho", [0.0, 0.5])
@pytest.mark.parametrize("options", RHYTHMS, ids=str)
def test_a_run_ends_with_the_mean_of_the_weights_at_the_ends_of_its_last_epochs(tmp_path, options, sam_rho):
    states, _, trainer, _, saved = averaged_run(tmp_path, StochasticWeightAverage(**SWA), sam_rho=sam_rho, **options)
    assert len(states) == 5 * STEPS
    assert trainer.global_step == saved["global_step"] == 5 * STEPS // options.get("accumulate_grad_batches", 1)
    assert (trainer.current_epoch, trainer.max_epochs, saved["epoch"]) == (5, 5, 4)
    assert_mean_of(saved, states[3 * STEPS - 1 :: STEPS])


def test_the_statistics_of_the_mean_are_those_of_a_pass_with_its_weights_and_what_is_measured_is_its_own(tmp_path):
    _, images, trainer, data, saved = averaged_run(tmp_path, StochasticWeightAverage(**SWA), sam_rho=0.5)
    trained = Classifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    norms = [module for module in trained.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) > 10
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    with torch.no_grad():
        for batch in images[-STEPS:]:  # which are not augmented here
            trained.train()(batch)
    for name, value in trained.named_buffers():
        if "running" in name or "tracked" in name:
            torch.testing.assert_close(saved["state_dict"][name], value, rtol=1e-5, atol=1e-6, msg=name)
    data.trainer = None
    logits, labels = seen(data, "val", trained.eval())
    assert float(trainer.callback_metrics["val/acc"]) == pytest.approx((logits.argmax(1) == labels).double().mean())


def test_frozen_statistics_stay_where_weights_are_averaged(tmp_path):
    frozen = callbacks.FineTuning(freeze=["backbone"])
    turned = partial(ETFHead, projection_dim=16)
    states, *_, saved = averaged_run(tmp_path, StochasticWeightAverage(**SWA), frozen, head=turned)
    assert_mean_of(saved, states[3 * STEPS - 1 :: STEPS])
    for name, value in states[0].items():
        if name.startswith("backbone."):
            assert torch.equal(saved["state_dict"][name], value), name
    fresh = saved["state_dict"]["head.embedder.batch_norm.running_var"]
    assert not torch.equal(fresh, torch.ones_like(fresh))


def test_steps_end_an_average_as_epochs_do(tmp_path):
    states, *_, saved = averaged_run(tmp_path, StochasticWeightAverage(**SWA), max_steps=4 * STEPS + 1, max_epochs=-1)
    assert_mean_of(saved, [states[3 * STEPS - 1], states[4 * STEPS - 1]])


def test_a_training_that_is_stopped_keeps_its_last_weights_and_says_so(tmp_path, capsys):
    stop = EarlyStopping("train/loss", patience=0, divergence_threshold=-1.0, check_on_train_epoch_end=True)
    states, *_, saved = averaged_run(tmp_path, StochasticWeightAverage(**SWA), stop)
    assert len(states) == STEPS
    assert_mean_of(saved, states[-1:])
    assert "the training ended early, so its weights are those of the last step" in capsys.readouterr().err


def test_an_average_that_no_epoch_would_enter_is_refused(tmp_path):
    with pytest.raises(UserError, match="swa_epoch_start 6 is never reached in 5 epochs, counted from 1"):
        averaged_run(tmp_path, StochasticWeightAverage(0.05, 6))


def average_on_two(rank, folder):
    torch.manual_seed(0)
    average, model = StochasticWeightAverage(0.05, 1, annealing_epochs=1), small()
    options = {"devices": 2, "strategy": "ddp", "max_epochs": 2, "limit_val_batches": 0, "default_root_dir": folder}
    new_trainer(average, **options).fit(model, datamodule=Digits(max_count=20, batch_size=50))
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_two_processes_end_with_the_same_average_and_the_same_statistics(two_ready_processes, tmp_path):
    one, other = two_ready_processes(average_on_two, [(tmp_path,)] * 2)
    assert [name for name, value in one.items() if not torch.equal(value, other[name])] == []
    assert int(one["backbone.bn1.num_batches_tracked"]) == 2
