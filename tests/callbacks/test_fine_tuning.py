"""Training that starts from a checkpoint or from a file of weights: by hand, unfrozen, resumed, on two processes, refused."""

from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from lightning.pytorch import Callback, seed_everything
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

import etflight.backbones  # noqa: F401  registers the models
from etflight import Classifier, CrossEntropyLoss, ETFHead, LinearHead, ScaledLinearHead
from etflight.callbacks import FineTuning
from etflight.cli.stages import main
from etflight.data import ArrayImages, Digits
from etflight.utils.errors import UserError
from tests import training
from tests.left_by_runs import assert_resumes, read
from tests.training import QUIET

CRT = {"load": {"backbone": "backbone"}, "freeze": ["backbone"]}
LWS = {"load": {"backbone": "backbone", "head": "head.linear"}, "freeze": ["backbone", "head.linear"]}
VIT = {"backbone": "test_vit", "model_kwargs": {"img_size": 8, "patch_size": 4}}
new_trainer = partial(training.new_trainer, max_epochs=3, num_sanity_val_steps=0, limit_val_batches=0)


def new_model(backbone="resnet20_cifar", head=LinearHead, **options):
    seed_everything(0, verbose=False)
    return Classifier(10, backbone, in_chans=1, head=head, **{"loss": CrossEntropyLoss, **options})


def full_batch():
    return Digits(imbalance_ratio=20, batch_size=500, crop_padding=0, val_fraction=0.1)


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory):
    """A checkpoint whose BatchNorm statistics and weights are not those of a new model."""
    path = tmp_path_factory.mktemp("stage_one") / "last.ckpt"
    return training.save_trained(path, new_model(), Digits(imbalance_ratio=20, batch_size=100))


@pytest.fixture
def features(stage_one):
    """What the stage-one model makes of all training images, their labels, and the model."""
    model = Classifier.load_from_checkpoint(stage_one).eval()
    return *training.seen(full_batch(), "train", model.features), model


def descend(logits, parameters, labels):
    """Three full-batch steps as the trainer's own: learning rate 0.1, momentum 0.9, weight decay 2e-4."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=2e-4)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(logits(), labels).backward()
        optimizer.step()


def test_crt_is_a_linear_classifier_of_the_stage_one_features(stage_one, features):
    h, labels, trained = features
    model, fresh = new_model(), new_model().head
    new_trainer(FineTuning(str(stage_one), **CRT)).fit(model, full_batch())
    descend(lambda: fresh(h), fresh.parameters(), labels)
    assert_close(model.head.weight, fresh.weight, rtol=0, atol=1e-5)
    assert_close(model.head.bias, fresh.bias, rtol=0, atol=1e-5)
    for name, value in trained.backbone.state_dict().items():  # in spite of weight decay; BatchNorm's statistics, too
        assert torch.equal(model.backbone.state_dict()[name], value), name


def test_lws_learns_a_scale_for_each_class_of_the_stage_one_head(stage_one, features):
    h, labels, trained = features
    model = new_model(head=ScaledLinearHead)
    new_trainer(FineTuning(str(stage_one), **LWS)).fit(model, full_batch())
    scale, old_logits = torch.ones(10, requires_grad=True), trained.head(h).detach()
    descend(lambda: scale * old_logits, [scale], labels)
    assert (scale - 1).abs().max() > 0.1  # it has learnt something
    assert_close(model.head.class_scale, scale, rtol=0, atol=1e-5)
    assert torch.equal(model.head.linear.weight, trained.head.weight)
    assert torch.equal(model.head.linear.bias, trained.head.bias)


def test_the_statistics_of_a_frozen_part_move_on_where_they_are_not_frozen(stage_one):
    model, data = new_model(), full_batch()
    new_trainer(FineTuning(str(stage_one), **CRT, freeze_statistics=False)).fit(model, data)
    backbone = Classifier.load_from_checkpoint(stage_one).backbone.train()
    images, _ = data.eval_transform(next(iter(data.eval_dataloader("train"))))
    with torch.no_grad():
        for _ in range(3):
            backbone(images)
    for name, value in backbone.state_dict().items():
        assert_close(model.backbone.state_dict()[name], value, rtol=1e-4, atol=1e-5)


class Break(Callback):
    def on_train_epoch_end(self, *_):
        raise RuntimeError


@pytest.mark.parametrize("unfreeze", [None, 2])
def test_a_frozen_part_trains_in_the_next_training_of_the_model_however_the_first_ended(unfreeze):
    model, tuning = new_model(), FineTuning(freeze=["backbone"], unfreeze_epoch=unfreeze)
    with pytest.raises(RuntimeError):
        new_trainer(tuning, Break(), limit_train_batches=1).fit(model, full_batch())
    assert all(parameter.requires_grad for parameter in model.parameters())
    before = model.backbone.conv1.weight.clone()
    new_trainer(tuning, limit_train_batches=1).fit(model, full_batch())
    assert torch.equal(model.backbone.conv1.weight, before) == (unfreeze is None)
    assert all(parameter.requires_grad for parameter in model.parameters())


class States(Callback):
    """The state of the model after each epoch, and in each step whether modules of the backbone were in training mode."""

    def __init__(self):
        self.states, self.modes = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.modes.append((trainer.current_epoch, {m.training for m in pl_module.backbone.modules()}))

    def on_train_epoch_end(self, trainer, pl_module):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})


def save_weights(path, name="resnet20_cifar", **kwargs):
    """Those of a colour network with a classifier; returns it."""
    torch.manual_seed(5)
    network = timm.create_model(name, num_classes=7, **kwargs)
    safetensors.torch.save_file(network.state_dict(), path)
    return network


@pytest.mark.parametrize(("name", "kwargs"), [("resnet20_cifar", {}), ("test_vit", VIT["model_kwargs"])])
def test_the_backbone_stays_as_it_was_given_until_its_epoch_and_all_of_it_moves_then(name, kwargs, tmp_path):
    network, states = save_weights(tmp_path / "w.safetensors", name, **kwargs), States()
    tuning = FineTuning(freeze=["backbone"], weights=str(tmp_path / "w.safetensors"), unfreeze_epoch=2)
    trainer = new_trainer(tuning, states, limit_train_batches=2, limit_val_batches=1, val_check_interval=1)
    trainer.fit(new_model(name, model_kwargs=kwargs, layer_decay=0.9), Digits(imbalance_ratio=20, batch_size=100))
    ends = {n for n, layer in network.named_modules() if layer is network.get_classifier()}
    given = {f"backbone.{n}": v for n, v in network.state_dict().items() if n.rpartition(".")[0] not in ends}
    stem = f"backbone.{network.pretrained_cfg['first_conv']}.weight"
    given[stem] = given[stem].sum(1, keepdim=True)  # of grey images
    for state in states.states[:2]:
        for name, value in given.items():
            assert torch.equal(state[name], value), name  # BatchNorm's statistics, too
    assert not torch.equal(states.states[0]["head.weight"], states.states[1]["head.weight"])
    assert not [name for name, value in given.items() if torch.equal(states.states[2][name], value)]
    # a validation after every step has put each module back into its own mode
    assert states.modes == [(epoch, {epoch == 2}) for epoch in (0, 0, 1, 1, 2, 2)]


@pytest.mark.parametrize(("std", "lines"), [(0.502, 0), (0.229, 1)])  # the first is another rounding of timm's 0.5
def test_images_normalised_otherwise_than_the_weights_expect_are_told(std, lines, tmp_path, capsys):
    save_weights(tmp_path / "w.safetensors", "test_resnet")
    training.save_arrays(tmp_path / "a.npz", shape=(8, 8, 3), classes=3)
    data = ArrayImages(tmp_path / "a.npz", mean=[0.498] * 3, std=[std] * 3, batch_size=8)
    model = Classifier(3, "test_resnet", head=LinearHead, loss=CrossEntropyLoss)
    new_trainer(FineTuning(weights=str(tmp_path / "w.safetensors")), fast_dev_run=True).fit(model, data)
    told = capsys.readouterr().err
    assert told.count("\n") == told.count("timm's weights expect std=[0.5, 0.5, 0.5]") == lines


def test_parts_alone_stay_and_a_parameter_that_never_trains_is_not_set_free_with_its_part():
    model, states = new_model(), States()
    model.head.bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuning = FineTuning(freeze=["head", "layer1"], unfreeze_epoch=1)
    new_trainer(tuning, states, max_epochs=2, limit_train_batches=1).fit(model, Digits(batch_size=50))
    for after, stays in zip(states.states, (("head.", "backbone.layer1."), ("head.bias",)), strict=True):
        moved = {name for name in before if not torch.equal(after[name], before[name])}
        assert moved == {name for name in before if not name.startswith((*stays, "temperature"))}


def second_stage(file):
    load = '{"backbone": "backbone", "head": "head.linear"}'
    return ["--model.head", "ScaledLinearHead", "--fine_tuning.checkpoint", file, "--fine_tuning.load", load,
            "--fine_tuning.freeze", "[backbone, head.linear]"]  # fmt: skip


def from_weights(file):
    return ["--model.head", "LinearHead", "--fine_tuning.weights", file, "--fine_tuning.freeze", "[backbone]",
            "--fine_tuning.unfreeze_epoch", 1, "--model.layer_decay", 0.7]  # fmt: skip


@pytest.mark.parametrize(
    ("tuning", "kills", "trained"),
    [(second_stage, [4], 1), (from_weights, [1, 3, 4], 2)],  # frozen for good; while frozen, where that ends, after it
)
def test_a_killed_run_resumes_bit_by_bit_without_the_file_it_started_from(tuning, kills, trained, stage_one, tmp_path):
    file = tmp_path / "file"
    if tuning is second_stage:
        file.write_bytes(stage_one.read_bytes())
    else:
        save_weights(file := tmp_path / "w.safetensors")
    data = ["--data", "Digits", "--data.imbalance_ratio", 20]
    fit = [
        "fit", *data, "--model.backbone", "resnet20_cifar", "--model.loss", "CrossEntropyLoss", *QUIET, "--monitor", "null",
        "--trainer.limit_train_batches", 3, "--trainer.max_epochs", 2, *tuning(file),
    ]  # fmt: skip
    assert_resumes(fit, tmp_path, kills, before_resuming=file.unlink)
    states = read(tmp_path / "whole")["optimizer_states"][0]["state"]
    assert len(states) == trained if tuning is second_stage else len(states) > trained
    test = ["test", *data, *QUIET, "--ckpt_path", str(tmp_path / "whole/checkpoints/last.ckpt"), *tuning(file)]
    main([*map(str, test), "--trainer.default_root_dir", str(tmp_path)])  # which has no use for the file either


def unfreeze(rank, folder, processes):
    model, states = new_model(**VIT, layer_decay=0.8), States()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = new_trainer(
        FineTuning(freeze=["backbone"], unfreeze_epoch=1), states, max_epochs=2, limit_train_batches=4, devices=processes,
        strategy="auto" if processes == 1 else "ddp", default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(model, datamodule=Digits(imbalance_ratio=20, batch_size=60 // processes))
    return before, *states.states


def test_two_processes_unfreeze_as_one_does(two_ready_processes, tmp_path):
    before, frozen, trained = unfreeze(0, tmp_path, 1)
    (_, first_frozen, first), (_, _, second) = two_ready_processes(unfreeze, [(tmp_path, 2)] * 2)
    assert all(torch.equal(first_frozen[name], before[name]) for name in before if name.startswith("backbone."))
    assert_close(first_frozen, frozen, rtol=0, atol=5e-6)
    assert_close(first, trained, rtol=0, atol=5e-6)
    assert_close(first, second, rtol=0, atol=0)
    assert max((trained[name] - frozen[name]).abs().max() for name in frozen) > 1e-3


# --- refused -----------------------------------------------------------------------------------------------------------


def refused(model, checkpoint=None, load=None, freeze=(), **options):
    with pytest.raises(UserError) as error:
        new_trainer(FineTuning(checkpoint and str(checkpoint), load, freeze, **options)).fit(model, full_batch())
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_checkpoint_of_another_model_is_refused_in_one_line(stage_one, tmp_path):
    assert "gone.ckpt does not exist" in refused(new_model(), tmp_path / "gone.ckpt", **CRT)
    assert "does not fit backbone of this model" in refused(new_model(**VIT), stage_one, **CRT)
    assert "not [32, 1, 3, 3]" in refused(new_model(model_kwargs={"width": 2}), stage_one, **CRT)


def test_parts_and_epochs_that_are_not_there_are_refused_in_one_line(stage_one):
    assert "has no such part" in refused(new_model(), stage_one, {"backbon": "backbone"})
    assert "did you mean backbone" in refused(new_model(), stage_one, {"backbone": "backbon"})
    assert "did you mean layer1" in refused(new_model(), freeze=["layer11"])
    assert "nothing is left to train" in refused(new_model(), freeze=["backbone", "head"])
    never = refused(new_model(), freeze=["backbone"], unfreeze_epoch=3)
    assert "unfreeze_epoch=3 is never reached in 3 epochs, counted from 0" in never


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"checkpoint": "c.ckpt"}, "go together"),
        ({"load": {"backbone": "backbone"}}, "go together"),
        ({"unfreeze_epoch": 1}, "unfreeze_epoch is 1: give .* freeze"),
        ({"unfreeze_epoch": 0, "freeze": ["backbone"]}, "unfreeze_epoch is 0: give an epoch of 1 or more"),
        ({"checkpoint": "c.ckpt", "load": {"a": "b"}, "weights": "w.pth"}, "not from both"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        FineTuning(**options)


# --- a fixed frame on a frozen backbone --------------------------------------------------------------------------------

FIXED = {"no projection": ETFHead, "random vectors": partial(LinearHead, frozen=True, batch_norm=True)}
TURNED = {
    "a projection": partial(ETFHead, projection_dim=64), "a narrow one": partial(ETFHead, projection_dim=16),
    "a wide one": partial(ETFHead, projection_dim=96), "a wide linear one": partial(ETFHead, projection_dim=96, linear_projection=True),
    "a rotation": partial(ETFHead, learn_rotation=True), "learnable vectors": LinearHead,
}  # fmt: skip
BRIEF = {"limit_train_batches": 1, "max_epochs": 2}


def tuned(head, *, unfreeze_epoch=None, **tuning):
    callback = FineTuning(unfreeze_epoch=unfreeze_epoch, **{"freeze": ["backbone"], **tuning})
    new_trainer(callback, **BRIEF).fit(new_model(head=head), full_batch())


@pytest.mark.parametrize("head", FIXED.values(), ids=FIXED)
def test_fixed_class_vectors_on_a_backbone_that_stays_frozen_are_refused_with_the_way_out(head, capsys):
    with pytest.raises(UserError, match=r"cannot learn on a frozen backbone.*unfreeze_epoch") as error:
        tuned(head)
    assert ("projection_dim=64" in str(error.value)) == (head is ETFHead)
    tuned(head, unfreeze_epoch=1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("etflight: warning: until epoch 1 ")
    assert str(error.value) in line


@pytest.mark.parametrize("head", TURNED.values(), ids=TURNED)
def test_what_can_turn_the_features_trains_on_a_frozen_backbone(head, capsys):
    tuned(head)
    assert "cannot learn" not in capsys.readouterr().err


def test_a_backbone_that_is_frozen_in_part_or_was_trained_with_the_frame_may_be_under_it(tmp_path):
    tuned(ETFHead, freeze=["layer1"])
    first = training.save_trained(tmp_path / "first.ckpt", new_model(head=ETFHead), full_batch())
    tuned(ETFHead, checkpoint=str(first), load={"backbone": "backbone"})
    with pytest.raises(UserError, match="cannot learn on a frozen backbone"):
        tuned(partial(ETFHead, seed=1), checkpoint=str(first), load={"backbone": "backbone"})
