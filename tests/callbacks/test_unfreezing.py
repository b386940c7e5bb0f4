"""Fine-tuning from a file of weights: a backbone that is frozen until an epoch, by hand, resumed, on two processes, refused."""

from functools import partial

import pytest
import safetensors.torch
import timm
import torch
from lightning.pytorch import Callback, Trainer
from torch.testing import assert_close

import etflight.backbones  # noqa: F401  registers the models
from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks import FineTuning
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.callbacks.test_fine_tuning import full_batch, new_model, new_trainer
from tests.left_by_runs import assert_same_run, read
from tests.system.test_ddp import GLOBAL_BATCH, largest_difference
from tests.system.test_resume import DIGITS, KILL


class States(Callback):
    """The state of the model after each epoch, and whether a module of the backbone was in training mode in its steps."""

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


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    save_weights(path)
    return path


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet20_cifar", {}),
        ("test_vit", {"img_size": 8, "patch_size": 4}),
        ("test_convnext", {"patch_size": 1}),
        ("test_efficientnet", {}),
    ],
)
def test_the_backbone_stays_as_it_was_given_until_its_epoch_and_all_of_it_moves_then(name, kwargs, tmp_path):
    network, states = save_weights(tmp_path / "w.safetensors", name, **kwargs), States()
    tuning = FineTuning(freeze=["backbone"], weights=str(tmp_path / "w.safetensors"), unfreeze_epoch=2)
    data = Digits(imbalance_ratio=20, batch_size=100)
    trainer = new_trainer(
        tuning, states, max_epochs=3, limit_train_batches=2, limit_val_batches=1, val_check_interval=1
    )
    trainer.fit(new_model({"backbone": name, "model_kwargs": kwargs}, layer_decay=0.9), data)
    ends = {n for n, layer in network.named_modules() if layer is network.get_classifier()}
    given = {f"backbone.{n}": v for n, v in network.state_dict().items() if n.rpartition(".")[0] not in ends}
    stem = f"backbone.{network.pretrained_cfg['first_conv']}.weight"
    given[stem] = given[stem].sum(1, keepdim=True)  # of grey images
    for state in states.states[:2]:
        for name, value in given.items():
            assert torch.equal(state[name], value), name  # BatchNorm's statistics, too
    assert not torch.equal(states.states[0]["head.weight"], states.states[1]["head.weight"])
    assert not [name for name, value in given.items() if torch.equal(states.states[2][name], value)]
    assert states.modes == [(epoch, {epoch == 2}) for epoch in (0, 0, 1, 1, 2, 2)]


def test_weights_and_statistics_are_those_of_plain_descent_by_hand():
    sgd = partial(torch.optim.SGD, lr=0.005, momentum=0.9, weight_decay=2e-4)  # larger steps amplify rounding
    data, model, twin = full_batch(), new_model(optimizer=sgd), new_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    new_trainer(FineTuning(freeze=["layer1", "head"], unfreeze_epoch=2)).fit(model, data)  # 3 epochs of a step each
    images, labels = data.eval_transform(next(iter(data.eval_dataloader("train"))))
    held = [twin.backbone.layer1, twin.head]
    optimizer = sgd(twin.parameters())
    for epoch in range(3):
        twin.train()
        for part in held:
            part.train(epoch == 2)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(twin(images), labels).backward()
        if epoch < 2:
            for part in held:
                part.zero_grad()
        optimizer.step()
    for name, parameter in twin.named_parameters():
        move = parameter - before[name]
        assert (model.get_parameter(name) - parameter).norm() < 0.05 * move.norm(), name  # rounding is amplified
    for name, buffer in twin.backbone.named_buffers():
        assert_close(model.backbone.get_buffer(name), buffer, rtol=1e-3, atol=1e-4)


def test_a_parameter_that_never_trains_is_not_set_free_with_its_part():
    model = new_model()
    model.head.bias.requires_grad_(False)
    tuning = FineTuning(freeze=["head"], unfreeze_epoch=1)
    new_trainer(tuning, max_epochs=2, limit_train_batches=1).fit(model, Digits(batch_size=50))
    assert model.head.weight.requires_grad
    assert not model.head.bias.requires_grad


def test_a_run_killed_while_frozen_or_after_it_resumes_bit_by_bit_without_the_weights(
    weights, etflight_command, tmp_path
):
    moved = tmp_path / "w.safetensors"
    moved.write_bytes(weights.read_bytes())
    fit = [
        "fit", *DIGITS, "--trainer.limit_train_batches", 4, "--checkpoint.every_n_steps", 1, "--model.layer_decay", 0.7,
        "--fine_tuning.weights", moved, "--fine_tuning.freeze", "[backbone]", "--fine_tuning.unfreeze_epoch", 1,
    ]  # fmt: skip
    whole = etflight_command(*fit, "--name", "whole", cwd=tmp_path)
    assert whole.status == 0, whole.err
    assert f"weights of the backbone taken from {moved}; its classifier is left out (fc.bias, fc.weight)" in whole.err
    kills = (1, 4, 5)  # while frozen, where that ends, after it
    for after in kills:
        kill = [*KILL, after, "--trainer.callbacks.mark", f"killed{after}.mark"]
        assert etflight_command(*fit, "--name", f"killed{after}", *kill, cwd=tmp_path).status == -9
    frozen = read(tmp_path / "runs/killed1")["optimizer_states"][0]["state"]
    assert len(frozen) == 2  # of BatchNorm in the head: nothing of the backbone has been stepped
    moved.unlink()
    for after in kills:
        resumed = etflight_command(*fit, "--name", f"killed{after}", "--ckpt_path", "last", cwd=tmp_path)
        assert resumed.status == 0, resumed.err
        assert_same_run(tmp_path / "runs/whole", tmp_path / f"runs/killed{after}")


def unfreeze(rank, folder, processes):
    torch.manual_seed(0)
    model = Classifier(
        10, "test_vit", LinearHead, CrossEntropyLoss, partial(torch.optim.SGD, lr=0.05, momentum=0.9), in_chans=1,
        model_kwargs={"img_size": 8, "patch_size": 4}, layer_decay=0.8,
    )  # fmt: skip
    states = States()
    trainer = Trainer(
        accelerator="cpu", devices=processes, strategy="auto" if processes == 1 else "ddp", max_epochs=2,
        limit_train_batches=4, limit_val_batches=0, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[FineTuning(freeze=["backbone"], unfreeze_epoch=1), states],
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.fit(model, datamodule=Digits(imbalance_ratio=20, batch_size=GLOBAL_BATCH // processes))
    return before, *states.states


def test_two_processes_unfreeze_as_one_does(two_ready_processes, tmp_path):
    before, frozen, trained = unfreeze(0, tmp_path, 1)
    (_, first_frozen, first), (_, _, second) = two_ready_processes(unfreeze, [(tmp_path, 2)] * 2)
    backbone = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(first_frozen[name], before[name]) for name in backbone)
    assert largest_difference(first_frozen, frozen) < 2e-6
    assert largest_difference(first, frozen) > 1e-3
    assert largest_difference(first, trained) < 2e-6
    assert largest_difference(first, second) == 0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"unfreeze_epoch": 1}, "has nothing to unfreeze: give an epoch of 1 or more and --fine_tuning.freeze"),
        ({"unfreeze_epoch": 0, "freeze": ["backbone"]}, "unfreeze_epoch is 0: give an epoch of 1 or more"),
        ({"checkpoint": "c.ckpt", "load": {"a": "b"}, "weights": "w.pth"}, "not from both"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, reason):
    with pytest.raises(UserError, match=reason):
        FineTuning(**options)


def of_another_network(path):
    save_weights(path, "resnet32_cifar")


WRONG_FILES = {
    "missing": (lambda path: None, "w.safetensors does not exist: give the path of FILE.safetensors, or one of torch.save"),
    "a web page": (lambda path: path.write_text("<html>404</html>"), "is damaged: fetch the file again, or save model.state_dict() alone"),
    "of another network": (of_another_network, "do not fit the backbone: it has a layer1.3.bn1.bias (and "),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_weights_are_one_line_on_the_command_line(case, etflight_command, tmp_path):
    write, reason = WRONG_FILES[case]
    write(tmp_path / "w.safetensors")
    result = etflight_command("fit", *DIGITS, "--fine_tuning.weights", "w.safetensors", cwd=tmp_path)
    assert result.status == 1
    (line,) = result.error_lines
    assert "weights w.safetensors" in line
    assert reason in line
    assert "Traceback" not in result.err
    assert not list(tmp_path.rglob("*.ckpt"))


def test_an_epoch_that_never_comes_is_refused_before_training():
    tuning = FineTuning(freeze=["backbone"], unfreeze_epoch=3)
    with pytest.raises(UserError, match="unfreeze_epoch 3 is never reached in 3 epochs, counted from 0"):
        new_trainer(tuning).fit(new_model(), full_batch())
    with pytest.raises(UserError, match="nothing is left to train"):
        new_trainer(FineTuning(freeze=["backbone", "head"], unfreeze_epoch=1)).fit(new_model(), full_batch())
