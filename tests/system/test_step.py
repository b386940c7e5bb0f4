"""What a training step and an evaluation batch are made of: no waiting for the device, one forward, fast layouts and optimizers."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, RMSprop
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, TensorDataset

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks import LastCheckpoint, NeuralCollapseMonitor, Speed, StepSeed, StopSignals
from etflight.data import Digits
from etflight.optim import match_layouts
from etflight.runs.folder import last_checkpoint
from tests.tensors import HostReads
from tests.training import DIGITS
from tests.training import new_trainer as trainer


def small(**options):
    return Classifier(10, "resnet20_cifar", in_chans=1, **options)


# --- no step waits for the device ----------------------------------------------------------------------------------------------

# what needs a tensor's values on the host, or a shape that only they give
PYTHON_READS = {
    "item", "tolist", "cpu", "numpy", "nonzero", "unique", "masked_select", "equal", "allclose", "synchronize",
    "__bool__", "__float__", "__int__", "__index__", "__contains__",
}  # fmt: skip


class ReadsOfPython(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in PYTHON_READS:
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class CountReads(Callback):
    """Counts them for each step, from the start of its batch to the start of the next one, loading and augmentation included.

    Where everything is on the host, λ of mixup and the places of crops, which are drawn there, look like reads.
    """

    def __init__(self):
        self.reads, self.watch = [], ExitStack()

    def on_train_batch_start(self, *_):
        self.watch.close()
        self.reads.append([])
        for mode in (ReadsOfPython(self.reads[-1]), HostReads(self.reads[-1])):
            self.watch.enter_context(mode)

    def on_train_epoch_end(self, *_):
        self.watch.close()


class Peek(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 6:
            float(outputs["loss"])


@pytest.mark.parametrize("loss", [{}, {"head": LinearHead, "loss": partial(CrossEntropyLoss, class_balance="batch")}])
def test_no_step_between_logging_points_waits_for_the_device(loss, tmp_path):
    """On several processes Lightning itself waits once a step, for a flag in `_broadcast_sigterm_tensor`, which nothing turns off."""
    count = CountReads()
    last = LastCheckpoint()
    callbacks = [count, StopSignals(last), last, StepSeed(), Speed(), Peek()]
    runs = trainer(
        callbacks=callbacks, max_epochs=1, limit_train_batches=12, limit_val_batches=0, log_every_n_steps=10,
        default_root_dir=tmp_path, gradient_clip_val=1.0,
    )  # fmt: skip
    runs.fit(small(**loss), datamodule=Digits(batch_size=16))
    assert len(count.reads) == 12
    assert [i for i, reads in enumerate(count.reads) if reads] == [6, 9, 11]  # 6 is this test's own: reads are seen


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_no_step_between_logging_points_waits_for_a_gpu(tmp_path):
    class Forbid(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("error" if batch_idx % 10 > 1 else "default")

    try:
        runs = trainer(
            callbacks=[Forbid(), StepSeed(), Speed()], max_epochs=1, limit_train_batches=10, limit_val_batches=0,
            log_every_n_steps=10, default_root_dir=tmp_path, precision="bf16-mixed", accelerator="gpu",
        )  # fmt: skip
        runs.fit(small(), datamodule=Digits(batch_size=16, crop_padding=1, mixup=0.5))
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- evaluation ----------------------------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_size_of_evaluation_batches():
    model = small().eval()
    expected, *others = (
        trainer().test(model, datamodule=Digits(batch_size=50, eval_batch_size=size), verbose=False)[0]
        for size in (None, 7, 500)
    )
    assert others == [pytest.approx(expected, abs=1e-5)] * 2


# --- layout, precision, optimizer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_channels_last_reaches_every_convolution(precision):
    seen = []

    def look(module, args):
        seen.append(all(t.is_contiguous(memory_format=torch.channels_last) for t in (args[0], module.weight)))

    model = Classifier(10, "resnet20_cifar", model_kwargs={"width": 2})
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    for module in convolutions:
        module.register_forward_pre_hook(look)
    batch = TensorDataset(torch.randn(8, 3, 16, 16), torch.arange(8))
    trainer(max_steps=1, precision=precision).fit(model, DataLoader(batch, batch_size=8))
    assert seen == [True] * len(convolutions)


def fused(optimizer=SGD, **options):
    model = small(optimizer=partial(optimizer, lr=0.01) if isinstance(optimizer, type) else optimizer)
    runs = trainer(max_steps=2, limit_val_batches=0, **options)
    runs.fit(model, datamodule=Digits(batch_size=16))
    return runs.optimizers[0].param_groups[0].get("fused")


def test_optimizers_step_fused_where_they_can():
    assert [fused(optimizer) for optimizer in (SGD, AdamW, Adagrad)] == [True] * 3
    assert fused(AdamW, precision="bf16-mixed") is True
    assert fused(RMSprop) is None
    assert fused(partial(SGD, lr=0.01, foreach=True)) is None
    assert fused(partial(SGD, lr=0.01, fused=False)) is False
    assert fused(gradient_clip_val=0.1) is None  # Lightning clips what is not fused


def test_an_optimizer_state_of_another_layout_is_laid_out_anew():
    weights = []
    for layout in (torch.channels_last, torch.contiguous_format):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last))
        optimizer = SGD([weight], lr=0.1, momentum=0.9, fused=True)
        for _ in range(3):
            weight.grad = torch.randn(4, 3, 3, 3).contiguous(memory_format=torch.channels_last)
            optimizer.step()
            state = optimizer.state[weight]
            state["momentum_buffer"] = state["momentum_buffer"].contiguous(memory_format=layout)
            match_layouts(optimizer)
        weights.append(weight.detach())
    assert torch.equal(*weights)


# --- compiled ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _quick_compiler(monkeypatch):
    """torch.compile without its C++ compiler, which takes minutes; graphs are captured and differentiated all the same."""
    torch.compiler.reset()
    backbone = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module, mode: backbone(module, backend="aot_eager"))
    yield
    torch.compiler.reset()


def compiled_run(folder, compile, **options):
    seed_everything(0, verbose=False)
    monitor = NeuralCollapseMonitor(layers=("layer1",), before_training=False)
    model = small(compile=compile)
    last = LastCheckpoint()
    runs = trainer(
        max_epochs=1, limit_train_batches=4, default_root_dir=folder, num_sanity_val_steps=0,
        callbacks=[last, monitor, EMAWeightAveraging(decay=0.5)], **options,
    )  # fmt: skip
    runs.fit(model, datamodule=Digits(batch_size=64, max_count=30))
    return model, monitor, torch.load(last_checkpoint(folder), weights_only=True)


@pytest.mark.usefixtures("_quick_compiler")
def test_a_compiled_backbone_changes_neither_names_nor_results_nor_what_is_watched(tmp_path):
    plain, expected, whole = compiled_run(tmp_path / "plain", False)
    torch._dynamo.utils.counters.clear()
    model, monitor, saved = compiled_run(tmp_path / "compiled", True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert saved["state_dict"].keys() == whole["state_dict"].keys()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    assert monitor.history.keys() == expected.history.keys()
    assert "nc_layer1/train/nc1" in monitor.history
    assert monitor.history["nc/val/alignment"] == pytest.approx(expected.history["nc/val/alignment"], abs=1e-3)
    loaded = Classifier.load_from_checkpoint(last_checkpoint(tmp_path / "compiled"))
    assert loaded.hparams["compile"] is True
    torch._dynamo.utils.counters.clear()
    trainer().test(loaded, datamodule=Digits(), verbose=False)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0  # only training pays for a compilation


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["true", "reduce-overhead"])
def test_the_real_compiler_trains(mode, etflight_command, tmp_path):
    few = ["--model.compile", mode, "--trainer.limit_train_batches", 3, "--name", "r"]
    etflight_command("fit", *DIGITS, *few, cwd=tmp_path).ran()
    saved = torch.load(last_checkpoint(tmp_path / "runs/r"), weights_only=True)
    assert not any("_orig_mod" in name for name in saved["state_dict"])
