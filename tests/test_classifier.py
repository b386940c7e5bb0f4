from collections import Counter
from copy import deepcopy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss, ETFHead, LinearHead
from etflight.data import Digits
from etflight.optim import WarmupCosine
from etflight.utils.errors import UserError

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}


def trainer(**options):
    return Trainer(accelerator="cpu", **{**QUIET, **options})


def small(**options):
    return Classifier(10, "resnet20_cifar", in_chans=1, **options)


def test_the_frame_neither_trains_nor_decays():
    seed_everything(0, verbose=False)
    model = small(optimizer=partial(SGD, lr=0.1, weight_decay=0.1))
    before = model.head.weight.clone()
    trainer(max_steps=5, limit_val_batches=0).fit(model, Digits(batch_size=16))
    assert torch.equal(model.head.weight, before)
    assert not any(p is model.head.weight for group in model.optimizers().param_groups for p in group["params"])


def test_parts_fit_together():
    model = small().eval()
    images = torch.randn(4, 1, 8, 8)
    features = model.features(images)
    assert features.shape == (4, 64)
    torch.testing.assert_close(model.embed(images), model.head.embed(features))
    torch.testing.assert_close(model(images), model.head(features))


def test_one_step_lowers_the_loss_by_the_optimizers_rule():
    seed_everything(0, verbose=False)
    model = small(head=LinearHead, loss=CrossEntropyLoss, optimizer=partial(SGD, lr=0.01))
    images, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    twin = small(head=LinearHead, loss=CrossEntropyLoss)
    twin.load_state_dict(model.state_dict())
    loss = F.cross_entropy(twin.train()(images), target)
    loss.backward()
    expected = [p.detach() - 0.01 * p.grad for p in twin.parameters()]
    trainer(max_steps=1, limit_val_batches=0).fit(model, DataLoader(TensorDataset(images, target), batch_size=16))
    for after, hand in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(after.detach(), hand)


class Counting(ETFHead):
    """Counts its calls while it trains and while it does not."""

    def __init__(self, in_features, num_classes):
        super().__init__(in_features, num_classes)
        self.calls = Counter()

    def forward(self, features):
        self.calls["all", self.training] += 1
        return super().forward(features)

    def target_logits(self, features, target):
        self.calls["own", self.training] += 1
        return super().target_logits(features, target)


def test_dot_regression_on_class_indices_never_computes_the_logits_of_all_classes():
    model = small(head=Counting)
    options = {"max_steps": 3, "limit_val_batches": 2, "num_sanity_val_steps": 0, "val_check_interval": 3}
    trainer(**options).fit(model, Digits(batch_size=16))
    assert model.head.calls == {("own", True): 3, ("all", False): 2}
    assert model.head.weight.grad is None
    mixed = small(head=Counting)
    trainer(max_steps=3, limit_val_batches=0).fit(mixed, Digits(batch_size=16, mixup=1.0))
    assert mixed.head.calls == {("all", True): 3}


@pytest.mark.parametrize("balance", ["none", "batch", "global"])
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_a_step_on_the_targets_logits_is_the_step_on_all(balance, autocast):
    counts = [50, 40, 30, 20, 10, 5, 4, 3, 2, 1]
    model = small(head=Counting, loss=partial(DotRegressionLoss, class_balance=balance), class_counts=counts)
    twin = deepcopy(model)
    twin.head.register_forward_hook(lambda *_: None)  # somebody looks at the logits
    twin.loss.set_class_counts(twin.class_counts)
    images, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 7
    losses = []
    for each in (model, twin):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            losses.append(each.training_step((images, target), 0))
        losses[-1].backward()
    assert (model.head.calls, twin.head.calls) == ({("own", True): 1}, {("all", True): 1})
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)


class DoublingHead(ETFHead):
    def forward(self, features):
        return 2 * super().forward(features)


class DoublingLoss(DotRegressionLoss):
    def forward(self, logits, target):
        return super().forward(2 * logits, target)


class DoublingSampleLosses(DotRegressionLoss):
    def sample_losses(self, logits, target):
        return super().sample_losses(2 * logits, target)


class DoublingClassifier(Classifier):
    def forward(self, images):
        return 2 * super().forward(images)


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        (Classifier, {"head": DoublingHead}),
        (Classifier, {"loss": DoublingLoss}),
        (Classifier, {"loss": DoublingSampleLosses}),
        (DoublingClassifier, {}),
    ],
    ids=["head", "loss", "sample losses", "classifier"],
)
def test_a_subclass_that_changes_the_logits_or_the_loss_trains_with_its_own(model, parts):
    images, target = torch.randn(16, 1, 8, 8), torch.arange(16) % 10
    theirs = model(10, "resnet20_cifar", in_chans=1, **parts)
    logits = theirs.head.embed(theirs.features(images)) @ theirs.head.weight.T
    expected = DotRegressionLoss()(2 * logits, target)
    torch.testing.assert_close(theirs.training_step((images, target), 0), expected)


@pytest.mark.parametrize("argument", ["head", "loss", "optimizer", "lr_scheduler"])
def test_a_lambda_is_refused_in_one_line(argument):
    with pytest.raises(UserError, match=f"{argument}=.*partial"):
        small(**{argument: lambda *a: None})


def test_a_model_made_in_python_saves_plain_data(tmp_path):
    model = small(
        head=partial(ETFHead, scale=2.0),
        loss=partial(DotRegressionLoss, length=2.0),
        optimizer=AdamW,
        lr_scheduler=WarmupCosine,
    )
    run = trainer(max_epochs=6, limit_train_batches=1, limit_val_batches=1)
    run.fit(model, Digits(batch_size=16))
    run.save_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["hyper_parameters"]["loss"] == {
        "class_path": "etflight.losses.DotRegressionLoss",
        "init_args": {"length": 2.0},
    }
    loaded = Classifier.load_from_checkpoint(tmp_path / "a.ckpt")
    assert loaded.class_names == [str(k) for k in range(10)]
    assert loaded.class_counts.tolist() == Digits().class_counts.tolist()
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(loaded.eval()(images), model.eval()(images), rtol=0, atol=0)
    replaced = Classifier.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=SGD)
    assert replaced.hparams["optimizer"]["class_path"] == "torch.optim.sgd.SGD"


def test_a_loaded_model_has_the_sphere_code_of_its_checkpoint_without_computing_one(tmp_path, caplog):
    model = small(head=partial(ETFHead, projection_dim=4, code="sphere"))
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "c.ckpt")
    with caplog.at_level("INFO", logger="etflight.geometry"):
        loaded = Classifier.load_from_checkpoint(tmp_path / "c.ckpt")
        assert not caplog.records
        small(head=partial(ETFHead, projection_dim=4, code="sphere"))
        assert len(caplog.records) == 1  # so it would have been seen
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_dot_regression_with_a_scale_that_differs_is_refused_at_once():
    with pytest.raises(UserError, match=r"scale 2\.0"):
        small(head=partial(ETFHead, scale=2.0))


def test_class_counts_come_from_the_data_and_reach_the_loss():
    model = small(loss=partial(DotRegressionLoss, class_balance="global"))
    data = Digits(imbalance_ratio=20)
    trainer(max_steps=1, limit_val_batches=0).fit(model, data)
    assert model.class_counts.tolist() == data.class_counts.tolist()
    with pytest.raises(UserError, match="one per class"):
        small(class_counts=[3, 4])


def test_a_loaded_model_balances_by_the_counts_it_was_trained_on(tmp_path):
    counts = Digits(imbalance_ratio=20).class_counts
    model = small(loss=partial(DotRegressionLoss, class_balance="global"), class_counts=counts)
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "c.ckpt")
    loaded = Classifier.load_from_checkpoint(tmp_path / "c.ckpt")
    logits, target = torch.randn(8, 10), torch.arange(8)
    torch.testing.assert_close(loaded.loss.train()(logits, target), model.loss.train()(logits, target))


def test_a_temperature_that_cannot_be_trusted_is_told_once_after_training(capsys):
    model = small(head=LinearHead, loss=CrossEntropyLoss, optimizer=partial(SGD, lr=0.0))
    torch.nn.init.zeros_(model.head.weight)  # all logits are equal
    torch.nn.init.zeros_(model.head.bias)
    trainer(max_epochs=2, limit_train_batches=1).fit(model, Digits(batch_size=64, val_fraction=0.1))
    told = [line for line in capsys.readouterr().err.splitlines() if "temperature" in line]
    line = "etflight: warning: do not trust the temperature 1: to 129 held-out images all are alike; hold out more (--data.val_fraction)"
    assert told == [line]


def test_temperature_is_fitted_on_held_out_validation_and_never_on_the_test_set():
    seed_everything(0, verbose=False)
    watched = small()
    trainer(max_epochs=1).fit(watched, Digits(batch_size=32))
    assert watched.temperature.item() == 1.0
    held_out = small()
    run = trainer(max_epochs=3)
    run.fit(held_out, Digits(batch_size=32, val_fraction=0.2))
    assert 0 < held_out.temperature.item() < 0.8  # unit cosines are never confident
    assert held_out.temperature_fit.doubt is None
    before = held_out.temperature.clone()
    result = run.test(held_out, Digits(batch_size=32, val_fraction=0.2), verbose=False)[0]
    assert torch.equal(held_out.temperature, before)
    assert result["test/ece_calibrated"] < result["test/ece"]
    images = torch.randn(4, 1, 8, 8)
    with torch.no_grad():
        expected = (held_out.eval()(images) / before).softmax(1)
        torch.testing.assert_close(held_out.probabilities(images), expected)


def test_averaged_weights_keep_the_frame():
    model = small()
    frame = model.head.weight.clone()
    trainer(max_steps=6, limit_val_batches=1, callbacks=[EMAWeightAveraging(decay=0.9)]).fit(
        model, Digits(batch_size=16)
    )
    torch.testing.assert_close(model.head.weight, frame, rtol=0, atol=1e-6)


def test_any_timm_model_is_a_backbone():
    model = Classifier(5, "test_vit", head=LinearHead, loss=CrossEntropyLoss)
    assert model(torch.randn(2, 3, 160, 160)).shape == (2, 5)


def test_a_schedule_that_cannot_be_stepped_is_named():
    model = small(lr_scheduler=partial(CosineAnnealingLR, T_max=0))
    with pytest.raises(UserError, match=r"lr_scheduler: CosineAnnealingLR\(T_max=0\) cannot work: .*zero"):
        trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=0).fit(model, Digits(batch_size=8))


def test_a_step_of_one_image_is_refused_where_it_has_no_spread():
    with pytest.raises(UserError, match=r"one image: give --data.batch_size 2"):
        trainer(max_steps=1, limit_val_batches=0).fit(small(), Digits(batch_size=1))
    linear = small(head=LinearHead, loss=CrossEntropyLoss)  # its backbone's maps have more than one pixel
    trainer(max_steps=1, limit_val_batches=0).fit(linear, Digits(batch_size=1))
    assert linear.global_step == 1


def test_post_hoc_logit_adjustment_decides_by_logits_less_log_priors_of_the_checkpoints_counts(tmp_path):
    seed_everything(0, verbose=False)
    data = Digits(imbalance_ratio=20, batch_size=50)
    plain = small(head=LinearHead, loss=CrossEntropyLoss)
    fitted = trainer(max_epochs=1, limit_val_batches=0)
    fitted.fit(plain, data)
    fitted.save_checkpoint(tmp_path / "c.ckpt")
    loaded = {tau: Classifier.load_from_checkpoint(tmp_path / "c.ckpt", logit_adjustment=tau) for tau in (0.0, 1.5)}
    loaded[1.5].temperature.fill_(2.0)
    results = {tau: trainer().test(model, Digits(), verbose=False)[0] for tau, model in loaded.items()}
    predicted = torch.cat(trainer().predict(loaded[1.5], Digits()))

    images, labels = zip(*(data.eval_transform(batch) for batch in data.eval_dataloader("test")), strict=True)
    labels = torch.cat(labels)
    with torch.no_grad():
        logits = plain.eval()(torch.cat(images)).double()
    frequencies = torch.as_tensor(data.class_counts).double() / data.class_counts.sum()
    adjusted = logits - 1.5 * frequencies.log()
    torch.testing.assert_close(predicted.double(), (adjusted / 2).softmax(1), rtol=1e-4, atol=1e-6)
    for tau, z in ((0.0, logits), (1.5, adjusted)):
        assert results[tau]["test/acc"] == pytest.approx((z.argmax(1) == labels).double().mean().item())
        assert results[tau]["test/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert results[0.0]["test/acc"] != results[1.5]["test/acc"]
    assert results[1.5]["test/ece"] != results[1.5]["test/ece_calibrated"]


@pytest.mark.parametrize(
    ("options", "reason"), [({"logit_adjustment": float("nan")}, "finite"), ({"logit_adjustment": 1.0}, "class_counts")]
)
def test_a_logit_adjustment_that_cannot_be_is_refused(options, reason):
    with pytest.raises(UserError, match=f"logit_adjustment.*{reason}"):
        small(**options).predict_step((torch.zeros(2, 1, 8, 8), torch.zeros(2)), 0)
