import math
from copy import deepcopy
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from etflight import CosineHead, CrossEntropyLoss, ETFHead, LinearHead
from etflight.analysis import features, sweep
from etflight.analysis.sweep import every_sample_once
from etflight.callbacks import CollapseFigures, LastCheckpoint, NeuralCollapseMonitor, sweep_rhythm
from etflight.data import Digits
from etflight.heads import Head
from etflight.runs.loggers import MetricsCSV
from etflight.utils.errors import UserError
from tests.callbacks.plain import TRAIN, VAL, K, Plain, fit, plain_monitor, trainer
from tests.metrics import oracle
from tests.metrics.oracle import assert_measures, measure
from tests.training import fit_digits, new_trainer, read_csv, seen
from tests.training import small_resnet as classifier


def digits(**kwargs):
    return Digits(max_count=12, batch_size=32, **kwargs)


def swept(watch):
    pairs = zip(watch.epochs, watch.history.get("nc/train/nc1", []), strict=False)
    return [epoch for epoch, value in pairs if not math.isnan(value)]


def assert_equal_values(history, prefix, values, rel=1e-6):
    assert_measures({name: history[f"{prefix}/{name}"][-1] for name in values}, values, rel)


def measured(h, y, decision, weight, centres=None):
    """The values from scratch with `nc4`, and the class statistics."""
    values, o = measure(h, y, weight)
    nearest = oracle.nearest_centre(centres or o, h.double())
    return {**values, "nc4": (nearest == decision.numpy()).mean()}, o


def plain_values(model, data, centres=None):
    model.eval()
    x, y = data.tensors
    with torch.no_grad():
        h = model.body(x)
        decision = model.fc(h).argmax(1)
    return measured(h, y, decision, model.fc.weight.detach(), centres)


# --- the numbers -------------------------------------------------------------------------------------------------------


def test_monitored_numbers_are_those_of_the_saved_checkpoint_computed_measure(tmp_path):
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
    centres = None
    for split in ("train", "val"):
        h, logits, y = seen(fresh, split, model.embed, model)
        values, o = measured(h, y, logits.argmax(1), model.head.weight, centres)
        centres = centres or o
        assert_equal_values(watch.history, f"nc/{split}", values)
        assert runs.callback_metrics[f"nc/{split}/nc1"].item() == pytest.approx(values["nc1"], rel=1e-6)
        assert watch.latest[split].counts.sum() == len(y)
    assert torch.equal(watch.latest_weight, model.head.weight)

    rows = [row for row in read_csv(tmp_path / "metrics.csv") if row["nc/train/nc1"]]
    assert [(int(row["step"]), float(row["epoch"])) for row in rows] == [(0, 0), (1, 0), (3, 1)]
    assert [float(row["nc/train/nc1"]) for row in rows] == pytest.approx(watch.history["nc/train/nc1"], rel=1e-6)
    assert rows[0]["nc/val/nc1"] == ""
    assert float(rows[2]["nc/val/nc4"]) == pytest.approx(watch.history["nc/val/nc4"][-1])


def test_the_monitor_measures_a_lightning_module_that_is_no_classifier(tmp_path):
    watch = plain_monitor()
    model, runs = fit(tmp_path, watch)
    values, centres = plain_values(model, TRAIN)
    assert_equal_values(watch.history, "nc/train", values)
    assert "nc/train/nc1" in runs.callback_metrics
    assert_equal_values(watch.history, "nc/val", plain_values(model, VAL, centres)[0])
    assert watch.epochs == [0, 1, 2]
    assert torch.equal(watch.latest_bias, model.fc.bias.detach())


def test_raw_features_and_layers_have_their_own_keys_and_no_class_vectors(tmp_path):
    raw = NeuralCollapseMonitor(space="backbone", snapshots=1)
    embedding = NeuralCollapseMonitor(snapshots=1, layers=("layer2", "backbone.layer3"))
    data, model = digits(), classifier()
    trainer(tmp_path, raw, embedding, epochs=1).fit(model, datamodule=data)
    model.eval()
    up_to_layer2 = nn.Sequential(*list(model.backbone.children())[:5])
    features, deep, y = seen(data, "train", model.features, lambda x: up_to_layer2(x).mean((2, 3)))
    assert_equal_values(raw.history, "nc_raw/train", measure(features, y)[0])
    assert_equal_values(embedding.history, "nc_layer2/train", measure(deep, y)[0], rel=1e-4)
    assert {"nc_backbone.layer3/val/cdnv", "nc_layer2/val/cdnv", "nc/val/alignment"} <= set(embedding.history)
    assert not {"nc_raw/train/alignment", "nc_layer2/train/alignment"} & {*raw.history, *embedding.history}
    assert 0 <= raw.history["nc_raw/val/nc4"][-1] <= 1
    assert raw.state_key == "NeuralCollapseMonitor{'space': 'backbone', 'head': 'head', 'online': False}"
    one, other = (np.load(tmp_path / name / "epoch_001.npz")["embeddings"] for name in ("snapshots_raw", "snapshots"))
    assert not np.array_equal(one, other)


def test_missing_classes_are_counted_and_what_is_undefined_is_nan(tmp_path):
    only = [i for i in range(43) if i % K == 2]
    watch = NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader(torch.utils.data.Subset(TRAIN, only)))
    _, runs = fit(tmp_path, watch)
    assert watch.history["nc/train/missing_classes"] == [3, 3, 3]
    assert math.isnan(watch.history["nc/train/nc1"][-1])
    assert math.isnan(runs.callback_metrics["nc/train/nc1"])


class OwnHead(Head):
    """A user's head with an embedder of its own."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes, embedder=nn.BatchNorm1d(in_features))
        self.weight, self.bias = nn.Parameter(torch.randn(num_classes, in_features)), None


def test_a_head_with_an_embedder_of_its_own_is_measured_and_its_batch_norm_left_alone(tmp_path):
    def run(*callbacks):
        model = classifier(head=OwnHead, loss=CrossEntropyLoss)
        trainer(tmp_path, *callbacks, epochs=1).fit(model, datamodule=digits())
        return model

    watch = NeuralCollapseMonitor(online=True)
    model, without = run(watch), run()
    assert watch.history["nc/train_online/missing_classes"] == [0]
    assert torch.equal(model.head.embedder.running_mean, without.head.embedder.running_mean)
    assert model.head.embedder.num_batches_tracked == without.head.embedder.num_batches_tracked


# --- when --------------------------------------------------------------------------------------------------------------


def test_the_untrained_model_is_measured_before_the_first_step_unless_told_not_to(tmp_path):
    class Look(Callback):
        def on_sanity_check_end(self, trainer, pl_module):
            self.checked = dict(trainer.callback_metrics)

        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                self.metrics = dict(trainer.callback_metrics)

    watch, look = plain_monitor(), Look()
    fit(tmp_path, watch, look, num_sanity_val_steps=2)
    torch.manual_seed(0)
    untrained = plain_values(Plain(), TRAIN)[0]["nc1"]
    assert watch.history["nc/train/nc1"][0] == pytest.approx(untrained, rel=1e-6)
    assert look.metrics["nc/train/nc1"].item() == pytest.approx(untrained, rel=1e-6)
    assert "nc/val/nc1" not in look.checked
    fit(tmp_path, watch := plain_monitor(before_training=False), look)
    assert not any(name.startswith("nc") for name in look.metrics)
    assert watch.epochs == [1, 2]


@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_the_sweep_runs_in_the_trainers_precision(tmp_path, precision):
    watch = plain_monitor()
    model, runs = fit(tmp_path, watch, precision=precision)
    model.eval()
    x, y = TRAIN.tensors
    with torch.no_grad(), runs.precision_plugin.forward_context():
        h = torch.cat([model.body(part.to(model.fc.weight.dtype)) for part in x.split(8)])
    values, _ = measure(h, y, model.fc.weight.detach())
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


def test_the_sweep_sees_all_training_images_unless_a_trial_run_sweeps_one_batch_and_writes_nothing(tmp_path):
    watch = plain_monitor(snapshots=1)
    fit(tmp_path, watch, CollapseFigures(), fast_dev_run=True)
    assert watch.latest["train"].counts.sum() == 8
    assert not list(tmp_path.iterdir())
    fit(tmp_path, watch, limit_train_batches=1, limit_val_batches=1)
    assert watch.latest["train"].counts.sum() == len(TRAIN)
    assert watch.latest["val"].counts.sum() == 8


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
        ({"max_steps": 9, "val": False}, [0, 1, 1.5]),
        ({"max_steps": 9, "val_check_interval": 2}, [0, 1 / 3, 2 / 3, 1, 4 / 3, 1.5]),
        ({"epochs": 5, "every": 2}, [0, 2, 4, 5]),
        ({"epochs": 4, "check_val_every_n_epoch": 2}, [0, 1, 2, 3, 4]),
        ({"stop": 18, "every": 2}, [0, 2, 3]),
        ({"stop": 18, "every": 3, "val": False}, [0, 3]),
        ({"stop": 10, "val_check_interval": 4}, [0, 4 / 6, 1 + 4 / 6]),
        ({"max_steps": 9, "every": 5, "average": True}, [0, 1.5]),
        ({"epochs": 2, "val": False, "average": True}, [0, 1, 2]),
        # one more epoch, for the statistics of BatchNorm
        ({"epochs": 4, "val": False, "stochastic_average": nn.BatchNorm1d(5)}, [0, 1, 2, 3, 4, 5]),
        ({"epochs": 4, "every": 2, "stochastic_average": nn.Identity()}, [0, 2, 4]),
    ],
)
def test_the_final_weights_are_measured_wherever_training_ends_and_the_checkpoint_knows(tmp_path, options, measured):
    options = {"epochs": 9, **options}
    watch = plain_monitor(every_n_epochs=options.pop("every", 1))
    others = [StopAfter(options.pop("stop"))] if "stop" in options else []
    others += [EMAWeightAveraging(decay=0.8)] if options.pop("average", False) else []
    model, first = Plain(), []
    if "stochastic_average" in options:
        model.body[1] = options.pop("stochastic_average")
        first = [StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=2)]
    rows = MetricsCSV(tmp_path)
    model, runs = fit(tmp_path, *first, LastCheckpoint(), watch, *others, model=model, logger=rows, **options)
    assert watch.epochs == pytest.approx(measured)
    assert_equal_values(watch.history, "nc/train", plain_values(model, TRAIN)[0])
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    saved = state["callbacks"][watch.state_key]["history"]
    assert saved["nc/train/nc1"] == pytest.approx(watch.history["nc/train/nc1"])
    logged = read_csv(tmp_path / "metrics.csv")
    assert state["etflight"]["metrics_rows"] == len(logged)
    final = [row for row in logged if row["nc/train/nc1"]][-1]
    assert float(final["nc/train/nc1"]) == pytest.approx(watch.history["nc/train/nc1"][-1])
    assert int(final["step"]) == runs.global_step - 1


class Counts(Callback):
    """The images that have been trained."""

    trained = 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.trained += len(batch[0])


@pytest.mark.parametrize(
    ("options", "at"),
    [
        ({"epochs": 30}, [0, 30]),
        ({"epochs": 50}, [0, 17, 34, 50]),
        ({"epochs": 50, "before_training": False}, [13, 26, 39, 50]),
        ({"epochs": 12}, [12]),
        ({"epochs": 11}, []),
        ({"epochs": 1}, []),
        ({"epochs": 13, "max_steps": 35}, []),
        ({"epochs": -1, "max_steps": 74}, [0, 24 + 2 / 3]),
        ({"epochs": 40, "limit_train_batches": 1}, [40]),
        ({"epochs": 26, "val_check_interval": 2}, [0, 26]),
        ({"epochs": 26, "accumulate_grad_batches": 2}, [0, 26]),
    ],
    ids=str,
)
def test_auto_sweeps_over_a_large_set_for_less_than_a_tenth_of_the_images_that_train(
    tmp_path, monkeypatch, options, at
):
    monkeypatch.setattr(sweep_rhythm, "_SMALL", 1000)  # pixels, of 20 images of 8 x 8
    watch = NeuralCollapseMonitor("auto", before_training=options.pop("before_training", True), spectra=False)
    counts, data = Counts(), Digits(max_count=2, batch_size=8)
    options = {"max_epochs": options.pop("epochs"), **options}
    options |= {"default_root_dir": tmp_path, "num_sanity_val_steps": 0, "limit_val_batches": 1}
    new_trainer(watch, counts, **options).fit(classifier(), datamodule=data)
    assert swept(watch) == pytest.approx(at)
    assert len(swept(watch)) * int(data.class_counts.sum()) < counts.trained / 10


def test_auto_measures_the_validation_images_of_a_large_set_always_and_says_when_it_sweeps(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setattr(sweep_rhythm, "_SMALL", 1000)
    watch = NeuralCollapseMonitor(every_n_epochs="auto")
    trainer(tmp_path, watch, epochs=36, limit_val_batches=1).fit(classifier(), datamodule=digits())
    assert watch.epochs == list(range(37))
    for name in ("nc1", "alignment"):
        assert not any(math.isnan(value) for value in watch.history[f"nc/val/{name}"][1:])
    assert "120 training images is measured before the training, every 18 epochs and at the end" in caplog.text

    # and leaves out a sweep that would take too long
    watch = NeuralCollapseMonitor(every_n_epochs="auto")
    trainer(tmp_path, watch, epochs=2, limit_val_batches=1).fit(classifier(), datamodule=digits())
    assert watch.epochs == [1, 2]
    assert {name.split("/")[1] for name in watch.history} == {"val"}
    assert "is not measured, since one sweep over them would add more than a tenth to this training" in caplog.text


def test_a_resumed_training_sweeps_over_a_large_set_as_one_that_was_not_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_rhythm, "_SMALL", 1000)

    class Save(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 9:
                trainer.save_checkpoint(tmp_path / "ten.ckpt")

    def epochs_swept(*callbacks, **kwargs):
        watch = NeuralCollapseMonitor(every_n_epochs="auto")
        runs = trainer(tmp_path, watch, *callbacks, epochs=36, limit_val_batches=1)
        runs.fit(classifier(), datamodule=digits(), weights_only=True, **kwargs)
        return swept(watch)

    assert epochs_swept(Save()) == epochs_swept(ckpt_path=tmp_path / "ten.ckpt") == [0, 18, 36]


def test_epochs_given_by_hand_are_kept_however_large_the_set(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_rhythm, "_SMALL", 1000)
    watch = NeuralCollapseMonitor(every_n_epochs=2)
    trainer(tmp_path, watch, epochs=3, val_check_interval=0.5).fit(classifier(), datamodule=digits())
    assert swept(watch) == [0, 1.5, 2, 2.5, 3]


def test_splits_choose_and_validation_costs_no_extra_forward(tmp_path):
    only_val, only_train = plain_monitor(splits=["val"]), plain_monitor(splits=["train"])
    model, _ = fit(tmp_path, only_val)
    assert {name.split("/")[1] for name in only_val.history} == {"val"}
    assert "nc/val/nc4" not in only_val.history
    assert "nc/val/alignment" in only_val.history
    steps = 2 * (6 + 3) + 2  # training, validation, and one sanity check of two batches
    assert model.forwards == steps
    model, _ = fit(tmp_path, only_train)
    assert {name.split("/")[1] for name in only_train.history} == {"train"}
    assert model.forwards == steps + 3 * 6  # a sweep before training and in each epoch


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
    values, _ = measure(torch.cat(seen), TRAIN.tensors[1], model.fc.weight.detach())
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
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()), "no hook stays"
        assert "embed" not in model.head.__dict__
        return model.state_dict()

    watch = NeuralCollapseMonitor(online=True, layers=("layer1",))
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


# --- another fit -------------------------------------------------------------------------------------


def test_a_second_fit_starts_a_new_history(tmp_path):
    watch = plain_monitor()
    fit(tmp_path, watch, epochs=3)
    fit(tmp_path, watch, epochs=1)
    assert watch.epochs == [0, 1]
    assert {len(series) for series in watch.history.values()} == {2}
    assert torch.equal(watch.state_dict()["anchors"]["train/"], watch.latest["train"].means.float())


# --- what is kept ------------------------------------------------------------------------------------------------------


def test_snapshots_and_gram_matrices_lie_in_the_run_folder(tmp_path):
    watch = plain_monitor(snapshots=3)
    model, _ = fit(tmp_path / "run", watch, epochs=2)
    for folder in ("snapshots", "gram"):
        files = sorted((tmp_path / "run" / folder).iterdir())
        assert [file.name for file in files] == ["epoch_000.npz", "epoch_001.npz", "epoch_002.npz"]
    model.eval()
    weight = model.fc.weight.detach().numpy()
    with torch.no_grad():
        features = model.body(TRAIN.tensors[0]).numpy()

    shot = np.load(tmp_path / "run" / "snapshots" / "epoch_002.npz")
    assert shot["embeddings"].dtype == np.float16
    assert shot["labels"].tolist() == [0, 1, 2, 3] * 3
    assert shot["indices"].tolist() == list(range(12))
    assert int(shot["epoch"]) == 2
    np.testing.assert_array_equal(shot["weight"], weight)
    np.testing.assert_allclose(shot["embeddings"], features[:12], rtol=2e-3, atol=1e-3)

    content = np.load(tmp_path / "run" / "gram" / "epoch_002.npz")
    assert content["classes"].tolist() == [0, 1, 2, 3]
    assert content["gram"].dtype == np.float32
    means = np.stack([features[TRAIN.tensors[1].numpy() == k].mean(0) for k in range(4)])
    rows = np.concatenate([means, weight, means.mean(0, keepdims=True)])
    np.testing.assert_allclose(content["gram"], rows @ rows.T, rtol=1e-5, atol=1e-5)


def test_the_gram_matrix_does_not_grow_with_the_number_of_classes(tmp_path):
    model, images = Plain(), DataLoader(TensorDataset(torch.randn(400, 6), torch.arange(400)), batch_size=50)
    model.fc = nn.Linear(5, 400)
    trainer(tmp_path, NeuralCollapseMonitor(head="fc", train_dataloader=images), epochs=1).fit(model, images)
    content = np.load(tmp_path / "gram" / "epoch_001.npz")
    assert content["gram"].shape == (201, 201)
    assert content["classes"][[0, -1]].tolist() == [0, 399]
    assert len(set(content["classes"].tolist())) == 100


def test_train_nc4_is_left_out_with_a_notice_when_embeddings_take_too_much_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "KEEP_BYTES", 100)
    watch = plain_monitor()
    with pytest.warns(UserWarning, match="nc/train/nc4 is left out"):
        fit(tmp_path, watch)
    assert "nc/train/nc4" not in watch.history
    assert 0 <= watch.history["nc/val/nc4"][-1] <= 1


# --- several processes -------------------------------------------------------------------------------------------------


def train_on_this_rank(rank, folder, **options):
    watch, online = NeuralCollapseMonitor(snapshots=2, layers=("layer1",)), NeuralCollapseMonitor(online=True)
    model = classifier(head=LinearHead, loss=CrossEntropyLoss)
    # every rank keeps its own BatchNorm statistics, as they are during training
    strategy = DDPStrategy(process_group_backend="gloo", broadcast_buffers=False)
    runs = trainer(folder, watch, online, devices=2, strategy=strategy, num_sanity_val_steps=0, **options)
    data = Digits(max_count=11, imbalance_ratio=2, batch_size=9)
    runs.fit(model, datamodule=data)
    sizes = [len(labels) for _, labels in data.eval_dataloader("train")]
    return watch.history | online.history, model.state_dict(), sizes


def test_two_processes_with_an_uneven_last_batch_measure_what_one_does(two_ready_processes, tmp_path):
    (history, state, sizes), (others, _, other_sizes) = two_ready_processes(train_on_this_rank, [(tmp_path,)] * 2)
    assert sum(sizes) != sum(other_sizes)
    for name, series in history.items():
        assert series == pytest.approx(others[name], rel=1e-12, nan_ok=True), name
    assert {"nc/val/nc4", "nc/train_online/nc1", "nc_layer1/val/cdnv"} <= set(history)

    model = classifier(head=LinearHead, loss=CrossEntropyLoss)
    model.load_state_dict(state)
    model.eval()
    h, logits, y = seen(Digits(max_count=11, imbalance_ratio=2, batch_size=9), "train", model.embed, model)
    assert len(y) == sum(sizes) + sum(other_sizes)
    values, _ = measured(h, y, logits.argmax(1), model.head.weight.detach())
    assert_equal_values(history, "nc/train", values, rel=1e-5)

    content = np.load(tmp_path / "snapshots" / "epoch_002.npz")
    expected = sorted(int(i) for k in range(10) for i in (y == k).nonzero()[:2, 0])
    assert content["indices"].tolist() == expected
    np.testing.assert_allclose(content["embeddings"], h[expected], rtol=2e-3, atol=1e-3)


def test_a_sweep_gives_each_process_its_own_statistics_back(two_ready_processes, tmp_path):
    without_validation = partial(train_on_this_rank, epochs=1, limit_val_batches=0)
    (history, state, _), (others, other, _) = two_ready_processes(without_validation, [(tmp_path,)] * 2)
    assert history["nc/train/nc1"] == pytest.approx(others["nc/train/nc1"], rel=1e-12)
    buffers = [name for name in state if name.endswith("running_mean")]
    assert buffers
    assert not any(torch.equal(state[name], other[name]) for name in buffers)


# --- loaders and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first_to_go", [0, 1])
def test_several_sources_watch_one_head(first_to_go):
    """Each catches what the head computed, BatchNorm of the batch included, whichever comes or goes first."""
    model = nn.Sequential(nn.Linear(8, 16), ETFHead(16, 5)).train()
    images, sources = torch.randn(6, 8), [features.EmbeddingSource(model, "1") for _ in range(2)]
    expected = deepcopy(model)[1].embed(model[0](images)).detach()
    for _ in range(3):
        twin = deepcopy(model)
        for source in sources:
            source.attach()
        model(images)
        for source in sources:
            torch.testing.assert_close(source.take(6).features[""], expected)
        sources[first_to_go].detach()
        model(images)
        torch.testing.assert_close(sources[1 - first_to_go].take(6).features[""], expected)
        sources[1 - first_to_go].detach()
        model.load_state_dict(twin.state_dict())


def test_the_vectors_of_a_cosine_head_are_those_that_it_compares():
    head = CosineHead(16, 5)
    with torch.no_grad():
        head.weight *= torch.arange(1, 6)[:, None]
    source = features.EmbeddingSource(nn.Sequential(head), "0")
    torch.testing.assert_close(source.weight, nn.functional.normalize(head.weight.detach(), dim=1))


def test_online_leaves_out_the_second_pass_of_a_sharpness_aware_step(tmp_path):
    """Its forwards are of other weights than those of the step."""
    found = []
    for rho in (0.0, 0.5):
        monitor = NeuralCollapseMonitor(splits=["train"], online=True, before_training=False)
        trainer(tmp_path, monitor, epochs=1, limit_train_batches=1).fit(classifier(sam_rho=rho), datamodule=digits())
        found.append(monitor.history["nc/train_online/nc1_ratio"])
    assert found[0] == found[1]


def test_a_convolution_of_1_x_1_is_a_head():
    model = nn.Sequential(nn.Flatten(), nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, K, 1))
    source = features.EmbeddingSource(model, "2")
    with source.attached():
        logits = model(TRAIN.tensors[0])
        caught = source.take(len(TRAIN))
    assert torch.equal(caught.features[features.HEAD], TRAIN.tensors[0])
    assert torch.equal(caught.decision, logits.flatten(1).argmax(1))
    assert source.weight.shape == (K, 6)


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


def test_what_is_missing_is_said_before_training(tmp_path):
    x, y = TRAIN.tensors
    soft = TensorDataset(x, nn.functional.one_hot(y, K).float())
    own, other = plain_monitor(), NeuralCollapseMonitor(head="body.0", train_dataloader=DataLoader(TRAIN))
    for watch, message in (
        ([NeuralCollapseMonitor(head="fcc")], "did you mean fc"),
        ([NeuralCollapseMonitor(head="body")], "class vectors"),
        ([NeuralCollapseMonitor(head="fc")], "train_dataloader="),
        ([plain_monitor(layers=("body.9",))], "layers 'body.9'"),
        ([NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader(soft))], "class indices"),
        ([own, other], "under the same names"),
        ([other, own], "under the same names"),
    ):
        with pytest.raises(UserError, match=message):
            fit(tmp_path, *watch)


def test_invalid_options_are_refused_at_once():
    for wrong in (
        {"every_n_epochs": 0},
        {"splits": ["test"]},
        {"splits": []},
        {"space": "pixels"},
        {"snapshots": -1},
        {"snapshots": 2, "online": True},
        {"snapshots": 2, "splits": ["val"]},
    ):
        with pytest.raises(UserError, match=next(iter(wrong))):
            NeuralCollapseMonitor(**wrong)


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ([], [0, 0, 1]),
        (["--monitor", "null"], []),
        (["--trainer.callbacks", "NeuralCollapseMonitor", "--trainer.callbacks.before_training=false"], [0, 1]),
    ],
    ids=["by default", "null", "the user's own in its place"],
)
def test_a_fit_from_flags_alone_leaves_the_collapse_of_each_epoch(tmp_path, options, measured):
    run = fit_digits(tmp_path, "--data.max_count", 5, "--trainer.max_epochs", 2, *options)
    rows = read_csv(run / "metrics.csv")
    for name in ("nc/train/nc1", "nc/train/alignment"):
        assert [float(row["epoch"]) for row in rows if row.get(name)] == measured
