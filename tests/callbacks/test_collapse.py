import csv
import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from etflight import Classifier, CrossEntropyLoss, ETFHead, LinearHead
from etflight.callbacks import CollapseFigures, LastCheckpoint, NeuralCollapseMonitor, collapse, features
from etflight.callbacks.features import PassStatistics, every_sample_once
from etflight.data import Digits
from etflight.heads import Head
from etflight.metrics import ClassStatistics, measures
from etflight.runs.loggers import MetricsCSV, run_folder
from etflight.utils.errors import UserError

K = 4


class Plain(LightningModule):
    """Somebody else's module: knows nothing of etflight."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(5, K)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def points(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % K
    return TensorDataset(torch.randn(n, 6, generator=generator) + labels[:, None], labels)


TRAIN, VAL = points(43), points(21, seed=1)


def trainer(tmp_path, *callbacks, epochs=2, **kwargs):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(max_epochs=epochs, callbacks=list(callbacks), default_root_dir=tmp_path, **{**defaults, **kwargs})


def plain_monitor(**kwargs):
    return NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader(TRAIN, batch_size=8, shuffle=True), **kwargs)


def fit(tmp_path, *callbacks, model=None, val=True, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    model = Plain() if model is None else model
    runs = trainer(tmp_path, *callbacks, **kwargs)
    loaders = (DataLoader(TRAIN, batch_size=8), DataLoader(VAL, batch_size=8) if val else None)
    runs.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return model, runs


def classifier(**kwargs):
    torch.manual_seed(0)
    return Classifier(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": 1}, **kwargs)


def digits(**kwargs):
    return Digits(max_count=12, batch_size=32, **kwargs)


def from_scratch(embeddings, labels, weight=None):
    """The measures by their definitions, in float64, with a pseudo-inverse and the full distance table."""
    h, w = embeddings.double().numpy(), None if weight is None else weight.double().numpy()
    y = labels.numpy()
    classes = np.unique(y)
    mu = np.stack([h[y == k].mean(0) for k in classes])
    within = sum((h[y == k] - m).T @ (h[y == k] - m) for k, m in zip(classes, mu, strict=True)) / len(h)
    M = mu - mu.mean(0)
    values = {"nc1": np.trace(within @ np.linalg.pinv(M.T @ M / len(M))) / len(M)}
    values["nc1_ratio"] = np.mean([h[y == k].var(0).sum() for k in classes]) / (M**2).sum(1).mean()
    if w is not None:
        W = w - w.mean(0)
        cosines = (M * W).sum(1) / np.linalg.norm(M, axis=1) / np.linalg.norm(W, axis=1)
        values["alignment"], values["alignment_std"] = cosines.mean(), cosines.std()
        values["nc3"] = ((M / np.linalg.norm(M) - W / np.linalg.norm(W)) ** 2).sum()
    return values, mu


def assert_equal_values(history, prefix, values, rel=1e-6):
    for name, value in values.items():
        assert history[f"{prefix}/{name}"][-1] == pytest.approx(value, rel=rel, abs=1e-9), name


def plain_values(model, data, centres=None):
    model.eval()
    x, y = data.tensors
    with torch.no_grad():
        h = model.body(x)
        logits = model.fc(h)
    values, mu = from_scratch(h, y, model.fc.weight.detach())
    mu = mu if centres is None else centres
    nearest = ((h.double().numpy()[:, None] - mu) ** 2).sum(2).argmin(1)
    values["nc4"] = (nearest == logits.argmax(1).numpy()).mean()
    return values, mu


# --- the numbers -------------------------------------------------------------------------------------------------------


def test_monitored_numbers_are_those_of_the_saved_checkpoint_computed_from_scratch(tmp_path):
    watch = NeuralCollapseMonitor()
    data = digits(imbalance_ratio=4)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    runs = trainer(tmp_path, watch, keep, enable_checkpointing=True, logger=MetricsCSV(tmp_path))
    runs.fit(classifier(), datamodule=data)

    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    model = classifier()
    model.load_state_dict(state["state_dict"])
    model.eval()
    fresh = digits(imbalance_ratio=4)
    passes = {}
    for split in ("train", "val"):
        batches = [fresh.eval_transform(batch) for batch in fresh.eval_dataloader(split)]
        with torch.no_grad():
            h = torch.cat([model.embed(x) for x, _ in batches])
            decision = torch.cat([model(x) for x, _ in batches]).argmax(1).numpy()
        passes[split] = h, torch.cat([y for _, y in batches]), decision
    centres = from_scratch(*passes["train"][:2])[1]
    for split, (h, y, decision) in passes.items():
        values, _ = from_scratch(h, y, model.head.weight)
        nearest = ((h.double().numpy()[:, None] - centres) ** 2).sum(2).argmin(1)
        values["nc4"] = (nearest == decision).mean()
        assert_equal_values(watch.history, f"nc/{split}", values)
        assert runs.callback_metrics[f"nc/{split}/nc1"].item() == pytest.approx(values["nc1"], rel=1e-6)
        assert watch.latest[split].counts.sum() == len(y)
    assert torch.equal(watch.latest_weight, model.head.weight)

    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["nc/train/nc1"]]
    assert [(int(row["step"]), float(row["epoch"])) for row in rows] == [(0, 0), (1, 0), (3, 1)]
    assert [float(row["nc/train/nc1"]) for row in rows] == pytest.approx(watch.history["nc/train/nc1"], rel=1e-6)
    assert rows[0]["nc/val/nc1"] == ""
    assert float(rows[2]["nc/val/nc4"]) == pytest.approx(watch.history["nc/val/nc4"][-1])


@pytest.mark.parametrize("val", [True, False])
def test_three_lines_in_somebody_elses_module(tmp_path, val):
    watch = plain_monitor()
    model, runs = fit(tmp_path, watch, val=val)
    values, centres = plain_values(model, TRAIN)
    assert_equal_values(watch.history, "nc/train", values)
    assert "nc/train/nc1" in runs.callback_metrics
    if val:
        assert_equal_values(watch.history, "nc/val", plain_values(model, VAL, centres)[0])
    else:
        assert "nc/val/nc1" not in watch.history
    assert watch.epochs == [0, 1, 2]
    assert torch.equal(watch.latest_bias, model.fc.bias.detach())


def test_a_plain_pytorch_loop_uses_the_statistics_directly():
    model = Plain().eval()
    statistics = ClassStatistics(num_classes=K, feature_dim=5)
    with torch.no_grad():
        for x, y in DataLoader(TRAIN, batch_size=8):
            statistics.update(model.body(x), y)
    values = measures.summary(statistics.compute(), model.fc.weight, model.fc.bias)
    expected, _ = plain_values(model, TRAIN)
    assert all(float(values[name]) == pytest.approx(expected[name], rel=1e-6) for name in ("nc1", "alignment", "nc3"))


def test_raw_features_have_their_own_keys_and_no_class_vectors_of_an_etf_head(tmp_path):
    raw, embedding = NeuralCollapseMonitor(space="backbone", snapshots=1), NeuralCollapseMonitor(snapshots=1)
    data, model = digits(), classifier()
    trainer(tmp_path, raw, embedding, epochs=1).fit(model, datamodule=data)
    model.eval()
    with torch.no_grad():
        batches = [data.eval_transform(batch) for batch in data.eval_dataloader("train")]
        features = torch.cat([model.features(x) for x, _ in batches])
    values, _ = from_scratch(features, torch.cat([y for _, y in batches]))
    assert_equal_values(raw.history, "nc_raw/train", values)
    assert "nc_raw/train/alignment" not in raw.history
    assert 0 <= raw.history["nc_raw/val/nc4"][-1] <= 1
    assert embedding.history["nc/train/nc1"] != raw.history["nc_raw/train/nc1"]
    assert raw.state_key != embedding.state_key
    one, other = (np.load(tmp_path / name / "epoch_001.npz")["embeddings"] for name in ("snapshots_raw", "snapshots"))
    assert not np.array_equal(one, other)


def test_layers_are_measured_by_name_and_by_index(tmp_path):
    watch = NeuralCollapseMonitor(layers=("layer2", "backbone.layer3", 3))
    data, model = digits(), classifier()
    trainer(tmp_path, watch, epochs=1).fit(model, datamodule=data)
    model.eval()
    with torch.no_grad():
        batches = [data.eval_transform(batch) for batch in data.eval_dataloader("train")]
        deep = [model.backbone.forward_intermediates(x, indices=[2], intermediates_only=True)[0] for x, _ in batches]
    values, _ = from_scratch(torch.cat(deep).mean((2, 3)), torch.cat([y for _, y in batches]))
    assert_equal_values(watch.history, "nc_layer2/train", values, rel=1e-4)
    named, indexed = (watch.history[f"nc_{layer}/train/nc1"][-1] for layer in ("backbone.layer3", "3"))
    assert named == pytest.approx(indexed, rel=1e-6)
    assert "nc_layer2/val/cdnv" in watch.history
    assert "nc_layer2/train/alignment" not in watch.history
    assert watch.latest_layers["layer2"]["train"].means.shape == (10, 32)


def test_missing_classes_are_counted_and_what_is_undefined_is_nan(tmp_path):
    only = [i for i in range(43) if i % K == 2]
    watch = NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader(torch.utils.data.Subset(TRAIN, only)))
    _, runs = fit(tmp_path, watch)
    assert watch.history["nc/train/missing_classes"] == [3, 3, 3]
    assert math.isnan(watch.history["nc/train/nc1"][-1])
    assert math.isnan(runs.callback_metrics["nc/train/nc1"])


class OwnHead(Head):
    """A user's head whose forward does not go through embed."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)
        self.batch_norm = nn.BatchNorm1d(in_features)
        self.weight, self.bias = nn.Parameter(torch.randn(num_classes, in_features)), None

    def embed(self, features):
        return self.batch_norm(features)

    def forward(self, features):
        return self.batch_norm(features) @ self.weight.T


def test_a_head_that_does_not_call_embed_is_measured_and_its_batch_norm_left_alone(tmp_path):
    def run(*callbacks):
        model = classifier(head=OwnHead, loss=CrossEntropyLoss)
        trainer(tmp_path, *callbacks, epochs=1).fit(model, datamodule=digits())
        return model

    watch = NeuralCollapseMonitor(online=True)
    model, without = run(watch), run()
    assert watch.history["nc/train_online/missing_classes"] == [0]
    assert torch.equal(model.head.batch_norm.running_mean, without.head.batch_norm.running_mean)
    assert model.head.batch_norm.num_batches_tracked == without.head.batch_norm.num_batches_tracked


# --- when --------------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_while_sanity_checking(tmp_path):
    watch = plain_monitor(before_training=False)

    class Look(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            assert watch.history == {}
            self.looked = True

    look = Look()
    fit(tmp_path, watch, look, num_sanity_val_steps=2)
    assert look.looked
    assert watch.epochs == [1, 2]


def test_the_untrained_model_is_measured_before_the_first_step_unless_told_not_to(tmp_path):
    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.metrics = dict(trainer.callback_metrics)

    watch, look = plain_monitor(), Look()
    fit(tmp_path, watch, look)
    torch.manual_seed(0)
    assert_equal_values({"nc/train/nc1": watch.history["nc/train/nc1"][:1]}, "nc/train", nc1_of(Plain()))
    assert look.metrics["nc/train/nc1"].item() == pytest.approx(watch.history["nc/train/nc1"][0], rel=1e-6)
    fit(tmp_path, watch := plain_monitor(before_training=False), look)
    assert look.metrics == {}
    assert watch.epochs == [1, 2]


def nc1_of(model):
    return {"nc1": plain_values(model, TRAIN)[0]["nc1"]}


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_sweep_runs_in_the_trainers_precision(tmp_path, precision):
    watch = plain_monitor()
    model, runs = fit(tmp_path, watch, precision=precision)
    model.eval()
    x, y = TRAIN.tensors
    with torch.no_grad(), runs.precision_plugin.forward_context():
        h = torch.cat([model.body(part.to(model.fc.weight.dtype)) for part in x.split(8)])
    values, _ = from_scratch(h, y, model.fc.weight.detach())
    assert_equal_values(watch.history, "nc/train", values)
    assert "nc/val/nc1" in watch.history


def test_only_the_first_validation_loader_is_measured(tmp_path):
    class Two(Plain):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            super().validation_step(batch, batch_idx)

    watch = plain_monitor()
    runs = trainer(tmp_path, watch)
    runs.fit(Two(), DataLoader(TRAIN, batch_size=8), [DataLoader(VAL, batch_size=8), DataLoader(TRAIN, batch_size=8)])
    assert watch.latest["val"].counts.sum() == len(VAL)
    assert "nc/val/nc1" in runs.callback_metrics


def test_a_trial_run_of_one_batch_sweeps_one_batch_and_writes_nothing(tmp_path):
    watch = plain_monitor(snapshots=1)
    fit(tmp_path, watch, fast_dev_run=True)
    assert watch.latest["train"].counts.sum() == 8
    assert not list(tmp_path.iterdir())


def test_every_n_epochs_and_always_the_last(tmp_path):
    watch = plain_monitor(every_n_epochs=2)
    fit(tmp_path, watch, epochs=5)
    assert watch.epochs == [0, 2, 4, 5]
    assert {len(series) for series in watch.history.values()} == {4}


def test_epochs_without_validation_are_measured_at_their_end(tmp_path):
    watch = plain_monitor()
    fit(tmp_path, watch, epochs=4, check_val_every_n_epoch=2)
    assert watch.epochs == [0, 1, 2, 3, 4]
    measured = [not math.isnan(value) for value in watch.history["nc/val/nc1"]]
    assert measured == [False, False, True, False, True]


def test_validation_within_an_epoch_is_measured_too(tmp_path):
    watch = plain_monitor()
    fit(tmp_path, watch, epochs=1, val_check_interval=3)
    assert watch.epochs == [0, 0.5, 1]


class StopAfter(Callback):
    """As early stopping does, at the end of an epoch or within one, when the monitor has had its turn."""

    def __init__(self, batches):
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or (self.batches % 6 and trainer.global_step >= self.batches)

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.batches


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({"max_steps": 9}, [0, 1, 1.5]),
        ({"max_steps": 9, "val": False}, [0, 1, 1.5]),
        ({"max_steps": 9, "val_check_interval": 2}, [0, 1 / 3, 2 / 3, 1, 4 / 3, 1.5]),
        ({"max_steps": 12}, [0, 1, 2]),
        ({"stop": 18, "every": 2}, [0, 2, 3]),
        ({"stop": 18, "every": 2, "val": False}, [0, 2, 3]),
        ({"stop": 18, "every": 3}, [0, 3]),
        ({"stop": 9, "every": 5}, [0, 1.5]),
        ({"stop": 10, "every": 1, "val_check_interval": 4}, [0, 4 / 6, 1 + 4 / 6]),
    ],
)
def test_the_final_weights_are_measured_wherever_training_ends_and_the_checkpoint_knows(tmp_path, options, measured):
    options = dict(options)
    watch = plain_monitor(every_n_epochs=options.pop("every", 1))
    stop = [StopAfter(options.pop("stop"))] if "stop" in options else []
    rows = MetricsCSV(tmp_path)
    model, runs = fit(tmp_path, LastCheckpoint(), watch, *stop, epochs=9, logger=rows, **options)
    assert watch.epochs == pytest.approx(measured)
    assert_equal_values(watch.history, "nc/train", plain_values(model, TRAIN)[0])
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["callbacks"][watch.state_key]["history"]["nc/train/nc1"] == pytest.approx(
        watch.history["nc/train/nc1"]
    )
    logged = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert state["etflight"]["metrics_rows"] == len(logged)
    final = [row for row in logged if row["nc/train/nc1"]][-1]
    assert float(final["nc/train/nc1"]) == pytest.approx(watch.history["nc/train/nc1"][-1])
    assert int(final["step"]) == runs.global_step - 1


@pytest.mark.parametrize("averaging", [True, False])
def test_figures_before_the_monitor_show_the_final_weights_too(tmp_path, averaging):
    ema = [EMAWeightAveraging(decay=0.8)] if averaging else []
    watch = plain_monitor(every_n_epochs=5)
    figures = CollapseFigures(every_n_epochs=9)
    fit(tmp_path, figures, *ema, watch, epochs=2, max_steps=9)
    assert watch.epochs == [0, 1.5]
    assert figures._drawn == {"nc": 1.5}


def test_auto_measures_large_sets_seldom_their_validation_images_always_and_says_so(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(collapse, "_SMALL", 1000)
    watch = NeuralCollapseMonitor(every_n_epochs="auto")
    trainer(tmp_path, watch, epochs=6).fit(classifier(), datamodule=digits())
    assert watch.epochs == [0, 1, 2, 3, 4, 5, 6]
    swept = [not math.isnan(value) for value in watch.history["nc/train/nc1"]]
    assert swept == [True, False, False, False, True, False, True]
    for name in ("nc1", "alignment"):
        assert not any(math.isnan(value) for value in watch.history[f"nc/val/{name}"][1:])
    assert "120 training images is measured every 4 epochs and at the end" in caplog.text


def test_auto_measures_a_small_set_each_epoch_without_a_word(tmp_path, caplog):
    caplog.set_level("INFO")
    watch = NeuralCollapseMonitor(every_n_epochs="auto")
    trainer(tmp_path, watch).fit(classifier(), datamodule=digits())
    assert not any(math.isnan(value) for value in watch.history["nc/train/nc1"])
    assert "collapse" not in caplog.text


def test_auto_leaves_out_a_sweep_that_outlasts_the_training(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(collapse, "_SMALL", 1000)
    watch = NeuralCollapseMonitor(every_n_epochs="auto")
    trainer(tmp_path, watch, epochs=2, limit_train_batches=1).fit(classifier(), datamodule=digits())
    assert watch.epochs == [1, 2]
    assert {name.split("/")[1] for name in watch.history} == {"val"}
    assert "is not measured, since one sweep over them would take longer" in caplog.text


def test_the_sweep_sees_all_training_images_whatever_training_is_limited_to(tmp_path):
    watch = plain_monitor()
    fit(tmp_path, watch, limit_train_batches=1, limit_val_batches=1)
    assert watch.latest["train"].counts.sum() == len(TRAIN)
    assert watch.latest["val"].counts.sum() == 8


def test_splits_choose(tmp_path):
    only_val, only_train = plain_monitor(splits=["val"]), plain_monitor(splits=["train"])
    model, _ = fit(tmp_path, only_val)
    assert {name.split("/")[1] for name in only_val.history} == {"val"}
    assert "nc/val/nc4" not in only_val.history
    assert "nc/val/alignment" in only_val.history
    steps = 2 * (6 + 3) + 2  # training, validation, and one sanity check of two batches
    assert model.forwards == steps
    fit(tmp_path, only_train)
    assert {name.split("/")[1] for name in only_train.history} == {"train"}


def test_validation_costs_no_extra_forward(tmp_path):
    model, _ = fit(tmp_path, plain_monitor(before_training=False), epochs=1, num_sanity_val_steps=0)
    assert model.forwards == 6 + 3 + 6


# --- leaves no trace ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("online", [False, True])
def test_training_is_bitwise_the_same_with_and_without_the_monitor(tmp_path, online):
    def state(*callbacks):
        torch.manual_seed(0)
        model, _ = fit(tmp_path, *callbacks, model=Plain(dropout=0.3))
        return {**model.state_dict(), "random": torch.rand(3), "numpy": torch.tensor(np.random.rand(2))}

    np.random.seed(0)
    without = state()
    np.random.seed(0)
    with_monitor = state(plain_monitor(online=online))
    assert all(torch.equal(value, with_monitor[name]) for name, value in without.items())


def test_each_submodules_own_mode_comes_back(tmp_path):
    class Frozen(Plain):
        def on_train_start(self):
            self.body[1].eval()

        def on_train_epoch_end(self):
            self.modes = [module.training for module in self.modules()]
            self.stage_is_training = self.trainer.training

    watch = plain_monitor()
    model, _ = fit(tmp_path, watch, model=Frozen(), val=False)
    assert model.stage_is_training
    frozen = list(model.modules()).index(model.body[1])
    assert [i for i, training in enumerate(model.modes) if not training] == [frozen]


def test_no_hook_stays(tmp_path):
    model = classifier()
    trainer(tmp_path, NeuralCollapseMonitor(online=True, layers=("layer1",)), epochs=1).fit(model, datamodule=digits())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "embed" not in model.head.__dict__


# --- online ------------------------------------------------------------------------------------------------------------


def test_online_takes_the_training_forwards_and_sweeps_never(tmp_path):
    seen = []

    class Watched(Plain):
        def training_step(self, batch, batch_idx):
            handle = self.fc.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
            loss = super().training_step(batch, batch_idx)
            handle.remove()
            return loss

    watch = NeuralCollapseMonitor(head="fc", online=True)
    model, runs = fit(tmp_path, watch, model=Watched(), epochs=1, num_sanity_val_steps=0)
    assert model.forwards == 6 + 3
    values, _ = from_scratch(torch.cat(seen), TRAIN.tensors[1], model.fc.weight.detach())
    assert_equal_values(watch.history, "nc/train_online", values)
    assert "nc/train_online/nc1" in runs.callback_metrics
    assert "nc/val/nc1" in watch.history
    assert not any(name.startswith("nc/train/") for name in watch.history)
    assert watch.epochs == [1]


def test_online_embeds_within_the_forward_of_our_heads(tmp_path):
    def run(*callbacks):
        # small steps: large ones amplify a rounding to whole digits
        model = classifier(head=ETFHead, optimizer=partial(torch.optim.SGD, lr=1e-3))
        trainer(tmp_path, *callbacks, epochs=1).fit(model, datamodule=digits())
        return model.state_dict()

    watch = NeuralCollapseMonitor(online=True)
    with_monitor, without = run(watch), run()
    # to rounding: a head that is watched gives the logits of all classes, where the loss needs only the targets'
    for name, value in without.items():
        torch.testing.assert_close(value, with_monitor[name], rtol=1e-4, atol=1e-6)
    assert watch.latest["train_online"].counts.tolist() == [12] * 10


def test_mixup_leaves_the_sweep_its_labels_and_online_nothing(tmp_path):
    sweep, online = NeuralCollapseMonitor(), NeuralCollapseMonitor(online=True)
    with pytest.warns(UserWarning, match="mixup"):
        trainer(tmp_path, sweep, online, epochs=1).fit(classifier(), datamodule=digits(mixup=1.0))
    assert sweep.latest["train"].counts.tolist() == [12] * 10
    assert "nc/train_online/nc1" not in online.history


# --- averaged weights, checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("monitor_first", [True, False])
@pytest.mark.parametrize("val", [True, False])
def test_averaged_weights_are_measured_wherever_their_callback_stands(tmp_path, monitor_first, val):
    watch, ema = plain_monitor(), EMAWeightAveraging(decay=0.8)
    order = (watch, ema) if monitor_first else (ema, watch)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(tmp_path, *order, keep, val=val, enable_checkpointing=True)
    model = Plain()
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    model.load_state_dict(state["state_dict"])
    assert not torch.equal(state["state_dict"]["fc.weight"], state["current_model_state"]["fc.weight"])
    values, centres = plain_values(model, TRAIN)
    assert_equal_values(watch.history, "nc/train", values)
    if val:
        assert_equal_values(watch.history, "nc/val", plain_values(model, VAL, centres)[0])
    assert watch.measured_weights == "averaged"


def test_a_resumed_run_continues_the_history(tmp_path):
    whole, first, second = plain_monitor(), plain_monitor(), plain_monitor()
    fit(tmp_path, whole, epochs=4)
    keep = ModelCheckpoint(dirpath=tmp_path, filename="last", save_on_train_epoch_end=True)
    fit(tmp_path, first, keep, epochs=2, enable_checkpointing=True)
    assert first.epochs == [0, 1, 2]
    fit(tmp_path, second, epochs=4, ckpt_path=tmp_path / "last.ckpt")
    assert second.epochs == whole.epochs == [0, 1, 2, 3, 4]
    for name, series in whole.history.items():
        assert series == pytest.approx(second.history[name], rel=1e-12, abs=1e-15, nan_ok=True), name


@pytest.mark.parametrize("val", [True, False])
def test_a_second_fit_starts_a_new_history(tmp_path, val):
    watch = plain_monitor()
    fit(tmp_path, watch, epochs=3, val=val)
    fit(tmp_path, watch, epochs=1, val=val)
    assert watch.epochs == [0, 1]
    assert {len(series) for series in watch.history.values()} == {2}


def test_anchors_of_the_last_epoch_serve_the_next(tmp_path):
    watch = plain_monitor()
    fit(tmp_path, watch)
    state = watch.state_dict()
    assert torch.equal(state["anchors"]["train/"], watch.latest["train"].means.float())
    passed = watch_pass(watch)
    assert torch.equal(passed.anchor[:K], state["anchors"]["train/"])


def watch_pass(watch):
    passed = PassStatistics(K, torch.device("cpu"), {"": watch.state_dict()["anchors"]["train/"]})
    passed.add({"": torch.zeros(1, 5)}, torch.tensor([0]))
    return passed.statistics[""]


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_snapshots_keep_the_first_embeddings_of_each_class(tmp_path):
    watch = plain_monitor(snapshots=3)
    model, runs = fit(tmp_path, watch, epochs=2)
    files = sorted((run_folder(runs) / "snapshots").iterdir())
    assert [file.name for file in files] == ["epoch_000.npz", "epoch_001.npz", "epoch_002.npz"]
    content = np.load(files[-1])
    assert content["embeddings"].dtype == np.float16
    assert content["labels"].tolist() == [0, 1, 2, 3] * 3
    assert content["indices"].tolist() == list(range(12))
    assert int(content["epoch"]) == 2
    np.testing.assert_array_equal(content["weight"], model.fc.weight.detach().numpy())
    model.eval()
    with torch.no_grad():
        expected = model.body(TRAIN.tensors[0][:12])
    np.testing.assert_allclose(content["embeddings"], expected, rtol=2e-3, atol=1e-3)


def test_gram_matrices_of_means_and_class_vectors_lie_in_the_run_folder(tmp_path):
    watch = plain_monitor()
    model, runs = fit(tmp_path, watch, epochs=2)
    files = sorted((run_folder(runs) / "gram").iterdir())
    assert [file.name for file in files] == ["epoch_000.npz", "epoch_001.npz", "epoch_002.npz"]
    content = np.load(files[-1])
    assert content["classes"].tolist() == [0, 1, 2, 3]
    model.eval()
    with torch.no_grad():
        features = model.body(TRAIN.tensors[0]).double().numpy()
    means = np.stack([features[TRAIN.tensors[1].numpy() == k].mean(0) for k in range(4)])
    rows = np.concatenate([means, model.fc.weight.detach().double().numpy(), means.mean(0, keepdims=True)])
    np.testing.assert_allclose(content["gram"], rows @ rows.T, rtol=1e-5, atol=1e-6)
    assert content["gram"].dtype == np.float32


def test_the_gram_matrix_does_not_grow_with_the_number_of_classes(tmp_path):
    model, labels = Plain(), torch.arange(400)
    model.fc = nn.Linear(5, 400)
    images = DataLoader(TensorDataset(torch.randn(400, 6), labels), batch_size=50)
    watch = NeuralCollapseMonitor(head="fc", train_dataloader=images, before_training=False)
    trainer(tmp_path, watch, epochs=1).fit(model, images)
    content = np.load(tmp_path / "gram" / "epoch_001.npz")
    assert content["gram"].shape == (101, 101)
    assert content["classes"][[0, -1]].tolist() == [0, 399]
    assert len(set(content["classes"].tolist())) == 50


def test_snapshots_lie_in_the_run_folder(tmp_path):
    _, runs = fit(tmp_path, plain_monitor(snapshots=1), epochs=1, logger=MetricsCSV(tmp_path / "run"))
    assert run_folder(runs) == tmp_path / "run"
    assert (tmp_path / "run" / "snapshots" / "epoch_001.npz").is_file()


def test_train_nc4_is_left_out_with_a_notice_when_embeddings_take_too_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "KEEP_BYTES", 100)
    watch = plain_monitor()
    with pytest.warns(UserWarning, match="nc/train/nc4 is left out"):
        fit(tmp_path, watch)
    assert "nc/train/nc4" not in watch.history
    assert 0 <= watch.history["nc/val/nc4"][-1] <= 1


# --- several processes -------------------------------------------------------------------------------------------------


class Pool(ClusterEnvironment):
    """Processes that are there already, with their process group."""

    def __init__(self, rank):
        self.rank = rank

    creates_processes_externally = True
    main_address, main_port = "localhost", 0

    @staticmethod
    def detect():
        return False

    def world_size(self):
        return 2

    def set_world_size(self, size):
        pass

    def global_rank(self):
        return self.rank

    def set_global_rank(self, rank):
        pass

    def local_rank(self):
        return self.rank

    def node_rank(self):
        return 0


def train_on_this_rank(rank, folder, online, validate=True):
    watch = NeuralCollapseMonitor(snapshots=2, layers=("layer1",), online=online)
    model = classifier(head=LinearHead, loss=CrossEntropyLoss)
    # every rank keeps its own BatchNorm statistics, as they are during training
    strategy = DDPStrategy(cluster_environment=Pool(rank), process_group_backend="gloo", broadcast_buffers=False)
    more = {} if validate else {"limit_val_batches": 0}
    runs = trainer(folder, watch, epochs=2, devices=2, strategy=strategy, num_sanity_val_steps=0, **more)
    data = Digits(max_count=11, imbalance_ratio=2, batch_size=9)
    runs.fit(model, datamodule=data)
    metrics = {name: float(value) for name, value in runs.callback_metrics.items()}
    sizes = [len(labels) for _, labels in data.eval_dataloader("train")]
    return watch.history, metrics, model.state_dict(), sizes


def test_two_processes_with_an_uneven_last_batch_measure_what_one_does(two_ready_processes, tmp_path):
    first, second = two_ready_processes(train_on_this_rank, [(tmp_path, False)] * 2)
    sizes = first[3], second[3]
    assert sum(sizes[0]) != sum(sizes[1])
    for name, series in first[0].items():
        assert series == pytest.approx(second[0][name], rel=1e-12, nan_ok=True), name
    nc = {name: value for name, value in first[1].items() if name.startswith("nc")}
    assert nc == pytest.approx({name: second[1][name] for name in nc}, nan_ok=True)

    model = classifier(head=LinearHead, loss=CrossEntropyLoss)
    model.load_state_dict(first[2])
    model.eval()
    data = Digits(max_count=11, imbalance_ratio=2, batch_size=9)
    batches = [data.eval_transform(batch) for batch in data.eval_dataloader("train")]
    with torch.no_grad():
        h, logits = (torch.cat([f(x) for x, _ in batches]) for f in (model.embed, model))
    labels = torch.cat([y for _, y in batches])
    assert len(labels) == sum(map(sum, sizes))
    values, centres = from_scratch(h, labels, model.head.weight.detach())
    nearest = ((h.double().numpy()[:, None] - centres) ** 2).sum(2).argmin(1)
    values["nc4"] = (nearest == logits.argmax(1).numpy()).mean()
    assert_equal_values(first[0], "nc/train", values, rel=1e-5)

    content = np.load(tmp_path / "snapshots" / "epoch_002.npz")
    expected = sorted(int(i) for k in range(10) for i in (labels == k).nonzero()[:2, 0])
    assert content["indices"].tolist() == expected
    np.testing.assert_allclose(content["embeddings"], h[expected], rtol=2e-3, atol=1e-3)


def test_a_sweep_gives_each_process_its_own_statistics_back(two_ready_processes, tmp_path):
    first, second = two_ready_processes(train_on_this_rank, [(tmp_path, False, False)] * 2)
    assert first[0]["nc/train/nc1"] == pytest.approx(second[0]["nc/train/nc1"], rel=1e-12)
    buffers = [name for name in first[2] if name.endswith("running_mean")]
    assert buffers
    assert not any(torch.equal(first[2][name], second[2][name]) for name in buffers)


def test_two_processes_measure_online(two_ready_processes, tmp_path):
    first, second = two_ready_processes(train_on_this_rank, [(tmp_path, True)] * 2)
    assert first[0]["nc/train_online/nc1"] == pytest.approx(second[0]["nc/train_online/nc1"], rel=1e-12)


# --- loaders and errors ------------------------------------------------------------------------------------------------


def test_a_loader_is_made_to_give_every_sample_once():
    shuffled = DataLoader(TRAIN, batch_size=8, shuffle=True, drop_last=True)
    parts = [every_sample_once(shuffled, 2, rank) for rank in (0, 1)]
    labels = [torch.cat([y for _, y in part]) for part in parts]
    assert [len(part) for part in labels] == [22, 21]
    assert torch.equal(labels[0], TRAIN.tensors[1][::2])
    sampler = torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(TRAIN), 5, drop_last=True)
    own = every_sample_once(DataLoader(TRAIN, batch_sampler=sampler), 1, 0)
    assert [len(y) for _, y in own] == [5] * 8 + [3]


def test_an_iterable_data_set_is_refused_on_several_processes():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(TRAIN)

    loader = DataLoader(Stream())
    assert every_sample_once(loader, 1, 0) is loader
    with pytest.raises(UserError, match="Stream"):
        every_sample_once(loader, 2, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"splits": ["test"]}, "splits"),
        ({"splits": []}, "splits"),
        ({"space": "pixels"}, "space"),
        ({"snapshots": -1}, "snapshots"),
    ],
)
def test_options_that_cannot_be_are_refused_at_once(options, message):
    with pytest.raises(UserError, match=message):
        NeuralCollapseMonitor(**options)


def test_what_is_missing_is_said_before_training(tmp_path):
    for watch, message in (
        (NeuralCollapseMonitor(head="fcc"), "did you mean fc"),
        (NeuralCollapseMonitor(head="body"), "class vectors"),
        (NeuralCollapseMonitor(head="fc"), "train_dataloader="),
        (plain_monitor(layers=("body.9",)), "layers 'body.9'"),
        (plain_monitor(layers=(1,)), "forward_intermediates"),
    ):
        with pytest.raises(UserError, match=message):
            fit(tmp_path, watch)


def test_probabilities_as_labels_of_the_sweep_are_refused(tmp_path):
    x, y = TRAIN.tensors
    soft = DataLoader(TensorDataset(x, nn.functional.one_hot(y, K).float()))
    with pytest.raises(UserError, match="class indices"):
        fit(tmp_path, NeuralCollapseMonitor(head="fc", train_dataloader=soft))


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ([], [0, 0, 1, 2]),
        (["--monitor.every_n_epochs", "2"], [0, 1, 2]),
        (["--monitor.before_training", "false"], [0, 1, 2]),
        (["--monitor", "null"], None),
        (["--trainer.callbacks", "NeuralCollapseMonitor", "--trainer.callbacks.every_n_epochs", "3"], [0, 2]),
    ],
    ids=["by default", "every second epoch", "not before training", "null", "the user's own in its place"],
)
def test_a_fit_from_flags_alone_leaves_the_collapse_of_each_epoch(tmp_path, options, measured):
    from etflight.cli.stages import main  # here, since the processes above import this file

    args = ["fit", "--data", "Digits", "--data.max_count=12", "--model.backbone=resnet20_cifar", "--name=demo"]
    args += [f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=3", "--trainer.accelerator=cpu"]
    main([*args, *options])
    with (tmp_path / "demo" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    if measured is None:
        assert not any(name.startswith("nc") for name in rows[0])
        return
    for name in ("nc/train/nc1", "nc/train/alignment"):
        assert [float(row["epoch"]) for row in rows if row[name]] == measured
