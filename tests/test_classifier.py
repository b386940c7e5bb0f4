import math
from collections import Counter, OrderedDict
from copy import deepcopy
from enum import StrEnum
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead, LogitAdjustedLoss
from etflight.callbacks import NeuralCollapseMonitor
from etflight.data import Digits
from etflight.optim import WarmupCosine
from etflight.utils.errors import UserError
from tests.training import new_trainer as trainer
from tests.training import save_untrained, small_vit
from tests.training import small_resnet as small

IMAGES, TARGET = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(16) % 10


# --- a step ------------------------------------------------------------------------------------------------------------


def test_parts_fit_together_for_any_timm_model():
    for model in (small(), small_vit()):
        features = model.eval().features(IMAGES)
        assert features.shape == (16, 64)
        torch.testing.assert_close(model.embed(IMAGES), model.head.embed(features))
        torch.testing.assert_close(model(IMAGES), model.head(features))


def test_one_step_lowers_the_loss_by_the_optimizers_rule():
    model, twin = (small(head=LinearHead, loss=CrossEntropyLoss, optimizer=partial(SGD, lr=0.01)) for _ in range(2))
    F.cross_entropy(twin.train()(IMAGES), TARGET).backward()
    expected = [p.detach() - 0.01 * p.grad for p in twin.parameters()]
    trainer(max_steps=1, limit_val_batches=0).fit(model, DataLoader(TensorDataset(IMAGES, TARGET), batch_size=16))
    for after, hand in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(after.detach(), hand)


class Break(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError


def test_a_training_that_broke_off_leaves_nothing_in_the_next():
    model, loader = small(), DataLoader(TensorDataset(IMAGES, TARGET), batch_size=8)
    bad = DataLoader(TensorDataset(IMAGES * torch.nan, TARGET), batch_size=16)
    with pytest.raises(UserError, match="the loss became NaN or infinite at step 0"):
        trainer(max_epochs=1, limit_val_batches=0).fit(model, bad)
    model.load_state_dict(small().state_dict())
    with pytest.raises(RuntimeError):
        trainer(Break(), max_epochs=1, limit_val_batches=0).fit(model, loader)
    model.load_state_dict(small().state_dict())
    logged = []
    for one in (model, small()):
        run = trainer(max_epochs=1, limit_val_batches=0)
        run.fit(one, loader)
        logged.append(float(run.callback_metrics["train/loss"]))
    assert logged[0] == logged[1]


@pytest.mark.parametrize("scales", [None, {"head": 0.5}])
def test_weights_decay_but_neither_a_learnt_scale_nor_a_rotation(scales):
    head = partial(ETFHead, scale=16.0, learn_scale=True, learn_rotation=True)
    optimizer = partial(SGD, lr=0.01, weight_decay=0.5)
    model, twin = (small(head=head, loss=CrossEntropyLoss, optimizer=optimizer, lr_scale=scales) for _ in range(2))
    for one in (model, twin):
        one.head.embedder.rotation.generator.data[0] = 0.1  # at first it is 0, which cannot decay
    F.cross_entropy(twin.train()(IMAGES), TARGET).backward()
    trainer(max_steps=1, limit_val_batches=0).fit(model, DataLoader(TensorDataset(IMAGES, TARGET), batch_size=16))
    for name, p in twin.named_parameters():
        rate = 0.01 * (0.5 if scales and name.startswith("head.") else 1)
        decay = 0 if name in ("head._log_scale", "head.embedder.rotation.generator") else 0.5
        expected = p.detach() - rate * (p.grad + decay * p.detach())
        torch.testing.assert_close(model.get_parameter(name).detach(), expected, msg=name)


def test_the_frame_neither_trains_nor_decays_nor_is_averaged():
    model = small(optimizer=partial(SGD, lr=0.1, weight_decay=0.1))
    before = model.head.weight.clone()
    trainer(EMAWeightAveraging(decay=0.9), max_steps=3, limit_val_batches=1).fit(model, Digits(batch_size=16))
    torch.testing.assert_close(model.head.weight, before, rtol=0, atol=1e-6)


class Counting(ETFHead):
    """Counts its calls while it trains and while it does not."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)
        self.calls = Counter()

    def logits(self, embedding):
        self.calls["all", self.training] += 1
        return super().logits(embedding)

    def target_logits(self, embedding, target):
        self.calls["own", self.training] += 1
        own = self.class_vectors.index_select(0, target)
        return (embedding * own).sum(dim=1) * self.scale


@pytest.mark.parametrize("balance", ["none", "batch", "global"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_dot_regression_on_class_indices_never_computes_the_logits_of_all_classes(balance, autocast):
    counts = [50, 40, 30, 20, 10, 5, 4, 3, 2, 1]
    model = small(head=Counting, loss=partial(DotRegressionLoss, class_balance=balance), class_counts=counts)
    twin = deepcopy(model)
    twin.loss.set_class_counts(twin.class_counts)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        losses = [model.training_step((IMAGES, TARGET % 7), 0), twin.loss(twin(IMAGES), TARGET % 7)]
    for loss in losses:
        loss.backward()
    assert (model.head.calls, twin.head.calls) == ({("own", True): 1}, {("all", True): 1})
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    model.training_step((IMAGES, F.one_hot(TARGET).float()), 0)  # as mixup makes them
    assert model.head.calls["all", True] == 1


class DoublingHead(ETFHead):
    def logits(self, embedding):
        return 2 * super().logits(embedding)


class DoublingLoss(DotRegressionLoss):
    def forward(self, logits, target):
        return super().forward(2 * logits, target)


class DoublingSampleLosses(DotRegressionLoss):
    def sample_losses(self, logits, target):
        return super().sample_losses(2 * logits, target)


class DoublingClassifier(Classifier):
    def forward(self, images):
        return 2 * super().forward(images)


DOUBLING = {"head": DoublingHead}, {"loss": DoublingLoss}, {"loss": DoublingSampleLosses}, {"model": DoublingClassifier}


@pytest.mark.parametrize("parts", DOUBLING, ids=str)
def test_a_subclass_that_changes_the_logits_or_the_loss_trains_with_its_own(parts):
    theirs = small(**parts)
    logits = theirs.head.embed(theirs.features(IMAGES)) @ theirs.head.weight.T
    expected = DotRegressionLoss()(2 * logits, TARGET)
    torch.testing.assert_close(theirs.training_step((IMAGES, TARGET), 0), expected)


def test_a_step_of_one_image_is_refused_where_it_has_no_spread():
    with pytest.raises(UserError, match=r"one image.*batch_size"):
        small().training_step((IMAGES[:1], TARGET[:1]), 0)
    # its backbone's maps have more than one pixel
    small(head=LinearHead, loss=CrossEntropyLoss).training_step((IMAGES[:1], TARGET[:1]), 0)


def test_a_network_in_double_or_half_precision_takes_images_of_float32():
    expected, other = small().eval(), small().eval().double()
    logits = other(IMAGES)
    assert logits.dtype == torch.float64
    torch.testing.assert_close(logits.float(), expected(IMAGES), rtol=1e-4, atol=1e-5)
    half = other.to(torch.bfloat16)
    assert half.embed(IMAGES).dtype == torch.float32
    assert F.cosine_similarity(half.embed(IMAGES), expected.embed(IMAGES)).min() > 0.99


# --- checkpoints and counts --------------------------------------------------------------------------------------------


def test_a_model_made_in_python_saves_plain_data(tmp_path):
    loss = partial(DotRegressionLoss, length=2.0, class_balance="global")
    model = small(head=partial(ETFHead, scale=2.0), loss=loss, optimizer=AdamW, lr_scheduler=WarmupCosine)
    data = Digits(batch_size=16, imbalance_ratio=20)
    run = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
    run.fit(model, data)
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["loss"]["init_args"] == {"length": 2.0, "class_balance": "global"}
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=SGD)
    assert loaded.hparams["optimizer"]["class_path"] == "torch.optim.sgd.SGD"
    assert loaded.class_names == [str(k) for k in range(10)]
    assert loaded.class_counts.tolist() == model.class_counts.tolist() == data.class_counts.tolist()
    torch.testing.assert_close(loaded.eval()(IMAGES), model.eval()(IMAGES), rtol=0, atol=0)
    logits = torch.randn(16, 10)
    torch.testing.assert_close(loaded.loss.train()(logits, TARGET), model.loss.train()(logits, TARGET))


def test_a_loaded_model_has_the_sphere_code_of_its_checkpoint_without_computing_one(tmp_path, caplog):
    model = small(head=partial(ETFHead, projection_dim=4, code="sphere"))
    path = save_untrained(tmp_path / "c.ckpt", model)
    with caplog.at_level("INFO", logger="etflight.geometry"):
        loaded = Classifier.load_from_checkpoint(path)
    assert not caplog.records
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_class_weights_weigh_the_training_loss_and_survive_a_checkpoint(tmp_path):
    logits, target = torch.randn(16, 10), torch.arange(16) % 10
    by_name = {"3": 4.0, "7": 0.5}
    in_a_list = [by_name.get(str(k), 1.0) for k in range(10)]
    expected = F.cross_entropy(logits, target, weight=torch.tensor(in_a_list), reduction="sum") / 16
    for given, weights in ((by_name, by_name), ({3: 4.0, 7: 0.5}, by_name), (in_a_list, in_a_list)):
        model = small(head=LinearHead, loss=CrossEntropyLoss, class_weights=given)
        run = trainer(max_epochs=1, limit_train_batches=1, limit_val_batches=1)
        run.fit(model, Digits(batch_size=16))
        torch.testing.assert_close(model.loss.train()(logits, target), expected)
        run.save_checkpoint(tmp_path / "a.ckpt")
        loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
        assert dict(loaded.hparams)["class_weights"] == weights
        assert run.test(loaded, Digits(), verbose=False) == run.test(model, Digits(), verbose=False)
        again = trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=1)
        again.fit(loaded, Digits(batch_size=16), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
        torch.testing.assert_close(loaded.loss.train()(logits, target), expected)
        torch.testing.assert_close(loaded.loss.eval()(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *(({name: lambda *_: None}, f"{name}=.*partial") for name in ("head", "loss", "optimizer", "lr_scheduler")),
        ({"head": partial(ETFHead, scale=2.0)}, r"scale 2\.0"),
        ({"class_counts": [3, 4]}, "one per class"),
        ({"class_weights": [1.0, 2.0]}, "class_weights has 2 entries"),
        ({"logit_adjustment": float("nan")}, "logit_adjustment.*finite"),
        ({"adjustment": "exponential"}, "adjustment is exponential.*additive"),
    ],
)
def test_parts_that_cannot_work_are_refused_in_one_line(options, reason):
    with pytest.raises(UserError, match=reason):
        small(**options)


def test_a_schedule_that_cannot_be_stepped_is_named():
    model = small(lr_scheduler=partial(CosineAnnealingLR, T_max=0))
    with pytest.raises(UserError, match=r"lr_scheduler: CosineAnnealingLR\(T_max=0\) cannot work: .*zero"):
        trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(model, Digits(batch_size=8))


# --- temperature and prior ---------------------------------------------------------------------------------------------


def test_a_temperature_that_cannot_be_trusted_is_told_once_after_training(capsys):
    model = small(head=LinearHead, loss=CrossEntropyLoss, optimizer=partial(SGD, lr=0.0))
    torch.nn.init.zeros_(model.head.weight)  # all logits are equal
    torch.nn.init.zeros_(model.head.bias)
    trainer(max_epochs=2, limit_train_batches=1).fit(model, Digits(batch_size=64, val_fraction=0.1))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "temperature" in line]
    assert "129 held-out images" in line
    assert "val_fraction" in line


def test_temperature_is_fitted_on_held_out_validation_and_never_on_the_test_set():
    watched, held_out = small(), small()
    trainer(max_epochs=1, limit_train_batches=2).fit(watched, Digits(batch_size=32))
    default = 10 / 9 / math.log(9 * 0.99 / 0.01)  # with it, an embedding on its class vector has the probability 0.99
    assert watched.temperature.item() == pytest.approx(default, rel=1e-6)
    assert not watched.is_calibrated
    on_its_vector = watched.calibrated(watched.head.weight @ watched.head.weight.T).softmax(1).diagonal()
    torch.testing.assert_close(on_its_vector, torch.full((10,), 0.99))
    seed_everything(0, verbose=False)
    run = trainer(max_epochs=2)
    run.fit(held_out, Digits(batch_size=32, val_fraction=0.2))
    assert 0 < held_out.temperature.item() < 0.8  # unit cosines are never confident
    assert held_out.is_calibrated
    assert held_out.temperature_fit.doubt is None
    before = held_out.temperature.clone()
    result = run.test(held_out, Digits(batch_size=32, val_fraction=0.2), verbose=False)[0]
    assert torch.equal(held_out.temperature, before)
    assert result["test/ece_calibrated"] < result["test/ece"]


def test_weights_that_are_loaded_bring_the_loss_its_counts():
    trained = small(head=LinearHead, loss=LogitAdjustedLoss, class_counts=list(range(10, 110, 10)))
    fresh = small(head=LinearHead, loss=LogitAdjustedLoss)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.loss.training_counts(), trained.class_counts)


def test_averaged_weights_are_adjusted_by_the_class_counts_before_the_first_step_too():
    model = small(head=LinearHead, loss=CrossEntropyLoss, logit_adjustment=1.0)
    averaging, few = (
        EMAWeightAveraging(decay=0.9, use_buffers=False),
        {"limit_train_batches": 1, "limit_val_batches": 1},
    )
    run = trainer(averaging, max_epochs=1, num_sanity_val_steps=1, **few)
    run.fit(model, Digits(imbalance_ratio=20, batch_size=16))
    assert "val/acc_head" in run.callback_metrics


@pytest.mark.parametrize("adjustment", ["additive", "multiplicative"])
def test_post_hoc_logit_adjustment_uses_the_frequencies_of_the_checkpoints_counts(adjustment, tmp_path):
    data = Digits(imbalance_ratio=20, batch_size=50)
    counts = torch.as_tensor(data.class_counts)
    plain = small(head=LinearHead, loss=CrossEntropyLoss, class_counts=counts.tolist())
    torch.nn.init.normal_(plain.head.bias)
    load = partial(Classifier.load_from_checkpoint, save_untrained(tmp_path / "c.ckpt", plain), adjustment=adjustment)
    loaded = {tau: load(logit_adjustment=tau) for tau in (0.0, 1.5)}
    loaded[1.5].temperature.fill_(2.0)
    results = {tau: trainer().test(model, Digits(), verbose=False)[0] for tau, model in loaded.items()}
    predicted = torch.cat(trainer().predict(loaded[1.5], Digits()))

    images, labels = zip(*(data.eval_transform(batch) for batch in data.eval_dataloader("test")), strict=True)
    labels = torch.cat(labels)
    with torch.no_grad():
        logits = plain.eval()(torch.cat(images)).double()
    prior = counts.double() / counts.sum()
    adjusted = logits - 1.5 * prior.log() if adjustment == "additive" else logits * prior**-1.5
    torch.testing.assert_close(predicted.double(), (adjusted / 2).softmax(1), rtol=1e-4, atol=1e-6)
    for tau, z in ((0.0, logits), (1.5, adjusted)):
        assert results[tau]["test/acc"] == pytest.approx((z.argmax(1) == labels).double().mean().item())
        assert results[tau]["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert results[0.0]["test/acc"] != results[1.5]["test/acc"]
    assert results[1.5]["test/ece"] != results[1.5]["test/ece_calibrated"]
    with pytest.raises(UserError, match="logit_adjustment needs the training counts"):
        small(logit_adjustment=1.0).predict_step((IMAGES, TARGET), 0)


# --- what a user brings along ------------------------------------------------------------------------------------------


class Foreign(LightningDataModule):
    """A data module of somebody else, with common names for what it has."""

    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)

    def train_dataloader(self):
        return DataLoader(TensorDataset(IMAGES, TARGET), batch_size=8)


def saved_and_loaded(model, folder, data=None, cls=Classifier, **given):
    fitted = trainer(max_steps=1, limit_val_batches=0)
    fitted.fit(model, data or Foreign())
    fitted.save_checkpoint(folder / "c.ckpt")
    return cls.load_from_checkpoint(folder / "c.ckpt", **given)


class Kind(StrEnum):
    ADDITIVE = "additive"


def test_numbers_of_numpy_and_torch_and_subclasses_of_plain_types_are_saved_as_these(tmp_path):
    options = {
        "optimizer": partial(SGD, lr=np.logspace(-3, -1, 3)[1]),
        "head": partial(ETFHead, scale=np.float32(16)),
        "loss": CrossEntropyLoss,
        "feature_penalty": np.float64(0.01),
        "logit_adjustment": torch.tensor(1.0),
        "adjustment": Kind.ADDITIVE,
        "lr_scale": OrderedDict(head=np.float64(0.5)),
        "class_weights": np.arange(1.0, 11.0),
        "class_counts": np.arange(1, 11),
    }
    loaded = saved_and_loaded(Classifier(np.int64(10), "resnet20_cifar", in_chans=1, **options), tmp_path)
    assert loaded.hparams["optimizer"]["init_args"] == {"lr": 0.01}
    assert loaded.hparams["class_weights"] == list(range(1, 11))
    assert loaded.hparams["lr_scale"] == {"head": 0.5}
    types = {"num_classes": int, "feature_penalty": float, "logit_adjustment": float, "adjustment": str}
    assert {name: type(loaded.hparams[name]) for name in types} == types


def test_what_no_checkpoint_can_hold_is_refused_before_training():
    with pytest.raises(UserError, match=r"model_kwargs=.* cannot be written into a checkpoint"):
        small(model_kwargs={"act_layer": torch.nn.GELU})
    with pytest.raises(UserError, match="backbone is a Linear"):
        Classifier(10, torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    "kind",
    [np.array, tuple, lambda names: dict(enumerate(names)), lambda names: np.array(names, "S")],
    ids=["array", "tuple", "dict", "bytes"],
)
def test_a_foreign_data_module_may_keep_its_own_facts_its_own_way(kind, tmp_path):
    names = [f"digit {k}" for k in range(10)]
    data = Foreign(class_names=kind(names), preprocessing=torch.nn.Identity(), class_counts=tuple(range(1, 11)))
    loaded = saved_and_loaded(small(), tmp_path, data)
    assert loaded.class_names == names
    assert loaded.class_counts.tolist() == list(range(1, 11))
    assert loaded.preprocessing is None


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"class_names": dict.fromkeys("abcdefghij", 0)}, "class_names of Foreign"),
        ({"class_names": 10}, "class_names of Foreign is 10"),
        ({"class_names": [*"abcdefgh", "a", "b"]}, "Foreign: classes 0 and 8 .* 'a' .and 1 other"),
        ({"class_counts": {0: 8}}, "class_counts is {0: 8}"),
    ],
)
def test_facts_that_cannot_be_read_are_refused_in_one_line(attributes, reason):
    with pytest.raises(UserError, match=reason):
        trainer(max_steps=1).fit(small(), Foreign(**attributes))


@pytest.mark.parametrize("images", [IMAGES[0], IMAGES.to(torch.uint8), IMAGES[0, 0]], ids=["one", "raw", "flat"])
def test_only_batches_of_normalised_images_are_taken(images):
    with pytest.raises(UserError, match=r"floating \[B, C, H, W\]"):
        small().eval()(images)


def test_images_without_labels_are_predicted():
    model = small().eval()
    (found,) = trainer().predict(model, DataLoader(IMAGES, batch_size=16))
    torch.testing.assert_close(found, model.probabilities(IMAGES))


def loader(labels, images=IMAGES):
    return DataLoader(TensorDataset(images, labels), batch_size=8)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.uint8, torch.uint16], ids=str)
@pytest.mark.parametrize("parts", [{}, {"head": LinearHead, "loss": CrossEntropyLoss}], ids=["frame", "linear"])
def test_labels_of_any_integer_dtype_train_and_test_alike(dtype, parts, tmp_path):
    results = []
    for labels in (TARGET, TARGET.to(dtype)):
        monitor = NeuralCollapseMonitor(train_dataloader=loader(labels))
        model, run = small(**parts), trainer(monitor, max_epochs=1, default_root_dir=tmp_path)
        run.fit(model, loader(labels), loader(labels))
        results.append({**run.callback_metrics, **run.test(model, loader(labels), verbose=False)[0]})
    assert {"train/loss", "val/acc", "test/loss", "nc/train/nc1", "nc/val/nc1"} <= results[0].keys()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)


ONE_HOT = F.one_hot(TARGET, 10)


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (ONE_HOT.float(), r"float32 \[8, 10\].*argmax"),
        (ONE_HOT, r"int64 \[8, 10\].*argmax"),
        (TARGET[:, None], r"int64 \[8, 1\].*one integer"),
        (TARGET.float(), r"float32 \[8\]"),
        (TARGET + 1, "label 10"),
        (TARGET - 1, "label -1"),
    ],
    ids=["one-hot", "integers", "column", "floating", "beyond", "negative"],
)  # fmt: skip
def test_labels_that_name_no_class_are_refused_in_one_line(labels, reason):
    fit = partial(trainer(max_epochs=1).fit, train_dataloaders=loader(TARGET))
    places = (trainer().test, "dataloaders"), (trainer().validate, "dataloaders"), (fit, "val_dataloaders")
    for evaluate, name in places:
        with pytest.raises(UserError, match=reason):
            evaluate(small(), **{name: loader(labels)})
    if not labels.is_floating_point():
        with pytest.raises(UserError, match=reason):
            trainer(max_epochs=1).fit(small(), loader(labels))


class OfDicts(Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, position):
        return {"image": IMAGES[position], "label": TARGET[position]}


@pytest.mark.parametrize(
    ("batches", "what"),
    [
        (DataLoader(IMAGES, batch_size=8), "a Tensor"),
        (DataLoader(TensorDataset(IMAGES, TARGET, TARGET), batch_size=8), "a list of Tensor, Tensor, Tensor"),
        (DataLoader(OfDicts(), batch_size=8), "a dict"),
        ([loader(TARGET), loader(TARGET)], "a list of list, list"),
    ],
    ids=["images", "three", "dict", "two loaders"],
)
def test_batches_that_are_not_images_and_labels_are_refused_in_one_line(batches, what):
    with pytest.raises(UserError, match=what):
        trainer(max_epochs=1).fit(small(), batches)
    if what == "a dict":
        with pytest.raises(UserError, match=what):
            trainer().predict(small(), batches)


def test_several_loaders_are_predicted_one_by_one_and_not_evaluated_together():
    two = [loader(TARGET), loader(TARGET, -IMAGES)]
    with pytest.raises(UserError, match="2 val loaders"):
        trainer(max_epochs=1).fit(small(), loader(TARGET), two)
    for evaluate, name in ((trainer().validate, "val"), (trainer().test, "test")):
        with pytest.raises(UserError, match=f"2 {name} loaders"):
            evaluate(small(), two)
        evaluate(small(), two[:1], verbose=False)
    model = small().eval()
    for found, images in zip(trainer().predict(model, two), (IMAGES, -IMAGES), strict=True):
        torch.testing.assert_close(torch.cat(found), model.probabilities(images))


class OfOwnLabels(Classifier):
    """Trains on images of which some have no label, -1."""

    def training_step(self, batch, batch_idx):
        images, labels = batch[0][batch[1] >= 0], batch[1][batch[1] >= 0]
        return super().training_step((images, labels), batch_idx)


def test_a_step_of_a_subclass_gets_its_batches_as_they_are():
    run = trainer(max_epochs=1)
    run.fit(small(OfOwnLabels), loader(torch.where(TARGET > 5, TARGET, -1)))
    assert run.callback_metrics["train/loss"].isfinite()


class WithTeacher(Classifier):
    def __init__(self, *args, root: str = "a/b.c", teacher=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature_of_teacher = None if teacher is None else 2.0


class Narrow(Classifier):
    def __init__(self, width: int = 1):
        super().__init__(10, "resnet20_cifar", in_chans=1, model_kwargs={"width": width})


class Weighted(Classifier):
    def __init__(self, num_classes, class_weights=None):
        weights = torch.arange(1.0, num_classes + 1) if class_weights is None else class_weights
        super().__init__(num_classes, "resnet20_cifar", LinearHead, CrossEntropyLoss, in_chans=1, class_weights=weights)
        self.save_hyperparameters()


def test_what_a_subclass_computes_counts_and_is_computed_again_on_loading(tmp_path):
    model = Weighted(10)
    models = model, saved_and_loaded(model, tmp_path, cls=Weighted)
    logits = torch.randn(16, 10)
    expected = F.cross_entropy(logits, TARGET, weight=torch.arange(1.0, 11), reduction="sum") / 16
    for one in models:
        torch.testing.assert_close(one.loss.train()(logits, TARGET), expected)


class Fetching(Classifier):
    def __init__(self):
        super().__init__(10, "resnet20_cifar", in_chans=1, pretrained=True)


def test_a_subclass_that_starts_from_weights_fetches_none_when_it_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("etflight.backbones.timm.create_model", partial(create, fetched := []))
    model = Fetching()
    assert fetched == [True]
    saved_and_loaded(model, tmp_path, cls=Fetching)
    assert fetched == [True, False]


def create(fetched, *args, pretrained, **kwargs):
    fetched.append(pretrained)
    return timm.models.create_model(*args, **kwargs)


def test_a_schedule_that_only_rises_is_told_of_once(capfd):
    for epochs, count in ((1, 1), (2, 0)):
        fitted = trainer(max_epochs=epochs, limit_train_batches=1, limit_val_batches=0)
        fitted.fit(small(lr_scheduler=partial(WarmupCosine, warmup_epochs=1 + (epochs == 1))), Foreign())
        assert capfd.readouterr().err.count("the learning rate only rises: training ends after 1 epochs") == count


def test_subclasses_with_arguments_of_their_own_are_loaded(tmp_path):
    mine = small(WithTeacher, teacher=torch.nn.Linear(2, 2))
    loaded = saved_and_loaded(mine, tmp_path, cls=WithTeacher, teacher=torch.nn.Linear(2, 2))
    assert loaded.temperature_of_teacher == 2
    assert loaded.hparams["root"] == "a/b.c"
    assert saved_and_loaded(Narrow(2), tmp_path, cls=Narrow).features(IMAGES).shape == (16, 128)


class Fixed(Classifier):
    def __init__(self, num_classes, **kwargs):
        super().__init__(num_classes, "resnet20_cifar", head=LinearHead, loss=CrossEntropyLoss, in_chans=1, **kwargs)


class FixedTwice(Fixed):
    def __init__(self, **kwargs):
        super().__init__(10, model_kwargs={"width": 2}, **kwargs)


@pytest.mark.parametrize(("model", "own"), [(Fixed, [10]), (FixedTwice, [])])
def test_a_subclass_with_fixed_arguments_beside_others_is_loaded(model, own, tmp_path):
    trained = model(*own, logit_adjustment=1.5)
    loaded = saved_and_loaded(trained, tmp_path, Foreign(class_counts=[1] * 10), cls=model)
    assert loaded.hparams == trained.hparams
    torch.testing.assert_close(loaded.state_dict(), trained.state_dict())
    assert model.load_from_checkpoint(tmp_path / "c.ckpt", logit_adjustment=0.5).hparams["logit_adjustment"] == 0.5
    with pytest.raises(UserError, match=r"c\.ckpt: .*multiple values for .*'in_chans'"):
        model.load_from_checkpoint(tmp_path / "c.ckpt", in_chans=3)


class OwnSteps(Classifier):
    """Logs its own loss, and skips every second batch."""

    def training_step(self, batch, batch_idx):
        if batch_idx % 2:
            return None
        loss = self.loss(self(batch[0]), batch[1])
        self.log("train/loss", 7.0, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/acc", 0.5)


class ByHand(Classifier):
    automatic_optimization = False

    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(self(batch[0]), batch[1]))


def test_steps_of_a_subclass_log_their_own_numbers_and_may_skip_or_optimise_by_hand():
    fitted = trainer(max_epochs=1, log_every_n_steps=1)
    fitted.fit(small(OwnSteps), Foreign().train_dataloader(), Foreign().train_dataloader())
    assert fitted.callback_metrics["train/loss"] == 7
    assert fitted.callback_metrics["val/acc"] == 0.5
    assert "val/loss" not in fitted.callback_metrics
    trainer(max_epochs=1, log_every_n_steps=1).fit(small(ByHand), Foreign())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_all_of_a_model_is_made_on_the_default_device():
    with torch.device("cuda"):
        model = small()
    assert {value.device.type for value in model.state_dict().values()} == {"cuda"}
