"""Hostile files: refused in one line, nothing imported, run, fetched or deleted.

Every payload leaves a file behind if it is imported or run; `test_the_payloads_work` shows that it would.
"""

import gzip
import io
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import torchcodec.decoders
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from safetensors.torch import save_file
from torchvision.datasets.utils import extract_archive

from etflight import Classifier, LinearHead
from etflight.data import ArrayImages, FashionMNIST
from etflight.data.files import FileSource, Paths, Square
from etflight.data.sets import read_idx
from etflight.utils.errors import UserError
from etflight.utils.limits import refuse_names
from tests.cli.test_stages import QUICK

ROOT = Path(__file__).parents[2]
SMALL = [
    *QUICK, "--trainer.limit_train_batches", 1, "--trainer.limit_val_batches", 1, "--trainer.limit_test_batches", 1,
    "--trainer.limit_predict_batches", 1,
]  # fmt: skip
TRACES = ("imported", "ran", "fetched")
EVIL_MODULE = """
open("imported", "w").close()
from etflight import LinearHead

def fn(*args, **kwargs):
    open("ran", "w").close()
    return 1.0

class Evil(LinearHead):
    def __init__(self, *args, **kwargs):
        fn()
        super().__init__(*args)
"""


class Bomb:
    def __reduce__(self):
        return (exec, ("open('ran', 'w').close()",))


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """A current folder with a module that leaves a trace; after the test there must be none."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evilmod.py").write_text(EVIL_MODULE)
    return tmp_path


@pytest.fixture(scope="module")
def content():
    model = Classifier(10, "resnet20_cifar", in_chans=1)
    return {
        "state_dict": model.state_dict(),
        "hyper_parameters": dict(model.hparams),
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.6.6",
    }


@pytest.fixture(scope="module")
def last(etflight_command, tmp_path_factory):
    """What a real run has saved."""
    folder = tmp_path_factory.mktemp("run")
    result = etflight_command("fit", *stage("fit")[1:], "--name", "r", "--model.backbone", "resnet20_cifar", cwd=folder)
    assert result.status == 0, result.err
    return torch.load(folder / "runs/r/checkpoints/last.ckpt", weights_only=True)


def stage(name):
    return [name, "--data", "Digits", *(SMALL if name == "fit" else SMALL[2:])]


def resume(path="c.ckpt"):
    return [*stage("fit"), "--trainer.max_epochs", 2, "--ckpt_path", path]


def spec(path, **init_args):
    return {"class_path": path, "init_args": init_args}


def assert_refused(result, cwd, *words):
    assert result.status in (1, 2), result.err
    assert len(result.error_lines) == 1, result.err
    assert "Traceback" not in result.err + result.out
    assert len(result.error_lines[0]) < 2000
    for word in words:
        assert word in result.error_lines[0]
    assert not [trace for trace in TRACES if (cwd / trace).exists()]


def test_the_payloads_work(cwd, content, etflight_command):
    pickle.loads(pickle.dumps(Bomb()))
    assert (cwd / "ran").exists()
    (cwd / "ran").unlink()
    torch.save({**content, "bomb": Bomb()}, "c.ckpt")
    torch.load("c.ckpt", weights_only=False)
    assert (cwd / "ran").exists()
    (cwd / "ran").unlink()
    own = etflight_command(*stage("fit"), "--model.backbone", "resnet20_cifar", "--model.head", "evilmod.Evil", cwd=cwd)
    assert own.status == 1  # dot regression cannot train it; the module was the user's own word, so it was imported
    assert (cwd / "imported").exists()
    assert (cwd / "ran").exists()


# --- checkpoints with code in them -----------------------------------------------------------------------------------------


def save_zip(content, path):
    torch.save({**content, "bomb": Bomb()}, path)


def save_legacy(content, path):
    torch.save({**content, "bomb": Bomb()}, path, _use_new_zipfile_serialization=False)


def save_bare_pickle(content, path):
    Path(path).write_bytes(pickle.dumps(Bomb()))


def save_tar(content, path):
    """The format before 2018, in which `torch.load` unpickles a member `pickle`."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in ("sys_info", "storages", "tensors", "pickle"):
            data = pickle.dumps(Bomb())
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def save_torchscript(content, path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(path)


def save_numpy(content, path):
    with Path(path).open("wb") as stream:
        np.savez(stream, state_dict=np.array([Bomb()], dtype=object))


HOSTILE_FORMATS = [save_zip, save_legacy, save_bare_pickle, save_tar, save_torchscript, save_numpy]


@pytest.mark.parametrize("save", HOSTILE_FORMATS, ids=lambda save: save.__name__[5:])
def test_no_format_of_checkpoint_runs_code(save, cwd, content, etflight_command):
    save(content, "c.ckpt")
    assert_refused(etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd), cwd, "c.ckpt")
    with pytest.raises(UserError, match=r"c\.ckpt"):
        Classifier.load_from_checkpoint("c.ckpt")
    assert not (cwd / "ran").exists()


FOREIGN_FILES = {
    "a state dict of torch.save": (lambda c: torch.save(c["state_dict"], "c.ckpt"), "no state_dict with hyper_parameters"),
    "a safetensors file": (lambda c: save_file({k: v.contiguous() for k, v in c["state_dict"].items()}, "c.ckpt"), "refused"),
    "a LightningModule of somebody else": (
        lambda c: torch.save({**c, "hyper_parameters": {"lr": 0.1}}, "c.ckpt"), "hyper_parameters have no num_classes"),
    "one with hyper-parameters like ours": (
        lambda c: torch.save({**c, "hyper_parameters": {**c["hyper_parameters"], "lr": 0.1}}, "c.ckpt"),
        "not one of a Classifier: it has the hyper-parameter 'lr'"),
    "a pickle of another protocol": (lambda c: Path("c.ckpt").write_bytes(pickle.dumps(Bomb(), 4)), "refused"),
    "an empty file": (lambda c: Path("c.ckpt").touch(), "truncated or damaged"),
    "a zip file cut short": (lambda c: save_half(c, "c.ckpt"), "truncated or damaged"),
    "a text": (lambda c: Path("c.ckpt").write_text("epoch,loss\n1,0.5\n"), "or no checkpoint"),
    "a folder": (lambda c: Path("c.ckpt").mkdir(), "is a folder"),
    "nothing": (lambda c: None, "does not exist"),
}  # fmt: skip


def save_half(content, path):
    torch.save(content, path)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize("name", FOREIGN_FILES)
def test_what_is_no_checkpoint_of_ours_is_one_line(name, cwd, content, etflight_command):
    save, words = FOREIGN_FILES[name]
    save(content)
    assert_told_alone(etflight_command("export", "c.ckpt", "--output", "exported", cwd=cwd), cwd, words)


COMMANDS = {
    "fit": resume(),
    "test": [*stage("test"), "--ckpt_path", "c.ckpt"],
    "predict": ["predict", "--images", "a.png", "--output", "p.csv", "--ckpt_path", "c.ckpt"],
    "collapse": ["collapse", "--data", "Digits", "--ckpt_path", "c.ckpt"],
}


@pytest.mark.parametrize("name", ["one with hyper-parameters like ours", "a pickle of another protocol"])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_so(command, name, cwd, content, etflight_command):
    save, words = FOREIGN_FILES[name]
    save(content)
    Image.new("RGB", (8, 8)).save("a.png")
    assert_told_alone(etflight_command(*COMMANDS[command], cwd=cwd), cwd, words)


def assert_told_alone(result, cwd, words):
    assert_refused(result, cwd, "c.ckpt", words)
    assert result.status == 1
    assert result.err.count("\n") == 1, result.err  # no warnings around it
    assert not {"p.csv", "exported", "runs"} & {path.name for path in cwd.iterdir()}


@pytest.mark.parametrize("command", ["fit", "validate", "predict", "collapse"])
def test_no_command_runs_code_of_a_checkpoint(command, cwd, content, etflight_command):
    save_zip(content, "c.ckpt")
    argv = resume() if command == "fit" else [*stage(command), "--ckpt_path", "c.ckpt"]
    argv = ["collapse", "--data", "Digits", "--ckpt_path", "c.ckpt"] if command == "collapse" else argv
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "c.ckpt", "refused")


@pytest.mark.parametrize("command", ["fit", "test"])
def test_last_runs_no_code(command, cwd, content, etflight_command):
    folder = cwd / "runs/r/checkpoints"
    folder.mkdir(parents=True)
    save_zip(content, folder / "last.ckpt")
    argv = [*stage(command), "--name", "r", "--ckpt_path", "last"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "last.ckpt", "refused")


HTTP = "http://127.0.0.1:{port}/c.ckpt"
OTHER_URLS = [
    "file://{cwd}/c.ckpt",
    "s3://bucket/c.ckpt",
    "hf://a/b/c.ckpt",
    "simplecache::" + HTTP,
    "registry:user/model",
]


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (HTTP, "command line"),
        (HTTP, "configuration"),
        *((url, "command line") for url in OTHER_URLS),
    ],
)
def test_a_url_is_refused_and_nothing_fetched(url, place, cwd, content, etflight_command):
    save_zip(content, "c.ckpt")
    body = Path("c.ckpt").read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            (cwd / "fetched").touch()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        url = url.format(port=server.server_port, cwd=cwd)
        Path("a.yaml").write_text(f"ckpt_path: {url}\n")
        given = {"command line": ["--ckpt_path", url], "configuration": ["-c", "a.yaml"]}
        result = etflight_command(*stage("test"), *given[place], cwd=cwd)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    assert_refused(result, cwd, "download it first")


def test_python_refuses_a_url_too(cwd):
    for url in ("https://127.0.0.1:9/c.ckpt", "s3://bucket/c.ckpt", "github://a:b@main/c.ckpt"):
        with pytest.raises(UserError, match="download it first"):
            Classifier.load_from_checkpoint(url)


def test_lightning_takes_no_file_for_a_url_or_a_name_of_its_own(cwd, content, etflight_command):
    torch.save(content, "best")
    Path("http").mkdir()
    torch.save(content, "http/c.ckpt")  # Lightning fetches whatever starts with http
    for path in ("best", "http/c.ckpt"):
        result = etflight_command(*stage("test"), "--ckpt_path", path, cwd=cwd)
        assert result.status == 0, result.err
        assert str(cwd / path) in result.err + result.out


def test_options_in_front_of_the_stage_bring_no_checkpoint_past_the_check(cwd, content, etflight_command):
    save_zip(content, "c.ckpt")
    Path("c.yaml").write_text("test: {ckpt_path: c.ckpt, data: Digits}\n")
    assert_refused(etflight_command("--config", "c.yaml", "test", cwd=cwd), cwd)


# --- plain checkpoints that name code --------------------------------------------------------------------------------------

FOREIGN = {
    "a function of the system": {"head": spec("os.system", command="touch ran")},
    "a module on disk": {"head": spec("evilmod.fn")},
    "a class on disk": {"head": spec("evilmod.Evil")},
    "torch.hub": {"loss": spec("torch.hub.load", repo_or_dir=".", model="fn", source="local")},
    "an imported class of another kind": {"head": spec("etflight.DotRegressionLoss")},
    "an abstract class": {"head": spec("etflight.Head")},
    "a class path in its arguments": {"head": spec("etflight.ETFHead", scale=spec("evilmod.fn"))},
    "a class path in a list": {
        "lr_scheduler": spec("torch.optim.lr_scheduler.MultiStepLR", milestones=[spec("evilmod.fn")])
    },
    "a function as text": {"lr_scheduler": spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda="evilmod.fn")},
    "functions as texts": {"lr_scheduler": spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda=["evilmod.fn"])},
    "a class as text": {"optimizer": spec("torch.optim.SGD", lr="evilmod.Evil")},
    "a class in place of a specification": {"head": "evilmod.Evil"},
    "arguments that are no names": {"head": spec("etflight.ETFHead") | {"init_args": [1]}},
    "model_kwargs with a class path": {"model_kwargs": {"act_layer": spec("evilmod.Evil")}},
    "model_kwargs with a class path as text": {"model_kwargs": {"act_layer": "{class_path: evilmod.Evil}"}},
    "model_kwargs as text": {"model_kwargs": "{act_layer: {class_path: evilmod.Evil}}"},
    "an instantiator": {"_instantiator": "evilmod.fn", "head": spec("evilmod.fn")},
    "a class of its own": {"_class_path": "evilmod.Evil"},
    "a backbone from the hub": {"backbone": "hf-hub:evil/model"},
    "a backbone from a folder": {"backbone": "local-dir:evil"},
    "a backbone that is no text": {"backbone": ["evilmod"]},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_names_no_code(name, cwd, content, etflight_command, monkeypatch):
    Path("evil").mkdir()
    Path("evil/config.json").write_text('{"architecture": "resnet18"}')
    Path("hubconf.py").write_text(EVIL_MODULE)
    hyper_parameters = content["hyper_parameters"] | FOREIGN[name]
    torch.save({**content, "hyper_parameters": hyper_parameters}, "c.ckpt")
    assert_refused(etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd), cwd)
    monkeypatch.syspath_prepend(cwd)
    with pytest.raises(UserError) as caught:
        Classifier.load_from_checkpoint("c.ckpt")
    assert "\n" not in str(caught.value)
    assert "evilmod" not in sys.modules
    assert not [trace for trace in TRACES if (cwd / trace).exists()]


@pytest.mark.parametrize("command", ["fit", "collapse"])
def test_other_commands_take_no_name_from_a_checkpoint_either(command, cwd, last, etflight_command):
    schedule = spec("torch.optim.lr_scheduler.LambdaLR", lr_lambda="evilmod.fn")
    torch.save({**last, "hyper_parameters": last["hyper_parameters"] | {"lr_scheduler": schedule}}, "c.ckpt")
    argv = resume() if command == "fit" else ["collapse", "--data", "Digits", "--ckpt_path", "c.ckpt"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "evilmod.fn")


def test_texts_are_refused_where_a_parser_could_import_what_they_name(cwd, content, etflight_command):
    """Also for a class that the user names: its arguments in the checkpoint are still somebody else's."""
    Path("my_heads.py").write_text(
        "from etflight import LinearHead\n"
        "class MyHead(LinearHead):\n"
        "    def __init__(self, in_features, num_classes, *, transform=None):\n"
        "        super().__init__(in_features, num_classes)\n"
    )
    head = spec("my_heads.MyHead", transform="{class_path: evilmod.Evil, init_args: {}}")
    torch.save({**content, "hyper_parameters": content["hyper_parameters"] | {"head": head}}, "c.ckpt")
    argv = [*stage("test"), "--ckpt_path", "c.ckpt", "--model.head", "my_heads.MyHead"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "evilmod.Evil", "transform")


def test_texts_that_can_only_be_texts_are_taken():
    class Mine(LinearHead):
        def __init__(
            self, *, path: str, mode: str | None = None, kind=None, names: list[str] | None = None
        ) -> None: ...

    refuse_names(Mine, {"path": "{a: b.c}", "mode": "x.y", "kind": "word", "names": ["a.b"]}, "head")
    for value in ("a.b", "{a: b}", ["c d"], {"k": {"k.k": 1}}):
        with pytest.raises(UserError, match="could name code"):
            refuse_names(Mine, {"kind": value}, "head")


def test_a_backbone_from_elsewhere_is_taken_from_the_user(cwd, content, etflight_command):
    Path("mine").mkdir()
    Path("mine/config.json").write_text('{"architecture": "resnet20_cifar"}')
    hyper_parameters = content["hyper_parameters"] | {"backbone": "local-dir:mine"}
    torch.save({**content, "hyper_parameters": hyper_parameters}, "c.ckpt")
    argv = [*stage("test"), "--ckpt_path", "c.ckpt"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "--model.backbone local-dir:mine")
    named = etflight_command(*argv, "--model.backbone", "local-dir:mine", cwd=cwd)
    assert named.status == 0, named.err
    assert Classifier.load_from_checkpoint("c.ckpt", backbone="local-dir:mine").hparams["backbone"] == "local-dir:mine"


def test_a_checkpoint_asks_for_no_other_weights(cwd, content, etflight_command):
    """Not even where the user's own configuration says `pretrained: true`, as the one that trained it did."""
    torch.save(Bomb(), "weights.pth")
    model_kwargs = {
        "checkpoint_path": "weights.pth",
        "pretrained_cfg_overlay": {"file": "weights.pth", "url": "http://127.0.0.1:9/x"},
    }
    hyper_parameters = content["hyper_parameters"] | {"pretrained": True, "model_kwargs": model_kwargs}
    torch.save({**content, "hyper_parameters": hyper_parameters}, "c.ckpt")
    model = Classifier.load_from_checkpoint("c.ckpt")
    assert model.hparams["pretrained"] is False
    assert model.hparams["model_kwargs"] == {"pretrained_cfg_overlay": {}}
    result = etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd)
    assert result.status == 0, result.err
    assert not (cwd / "ran").exists()


# --- plain checkpoints of the wrong shape ----------------------------------------------------------------------------------


def nested(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def endless():
    value = []
    value.append(value)
    return value


MALFORMED = {
    "state_dict of another model": (lambda c: {"state_dict": {"x": torch.ones(1)}}, "weights"),
    "state_dict of other shapes": (
        lambda c: {"state_dict": {k: torch.ones(3, 3, 3) for k in c["state_dict"]}}, "weights"),
    "state_dict of huge tensors without storage": (
        lambda c: {"state_dict": {k: torch.zeros(1).expand(10**12) for k in c["state_dict"]}}, "weights"),
    "state_dict of no tensors": (lambda c: {"state_dict": {"x": 1}}, "state_dict"),
    "state_dict that is a list": (lambda c: {"state_dict": [1]}, "state_dict"),
    "hyper_parameters that are a list": (lambda c: {"hyper_parameters": [1]}, "hyper_parameters"),
    "hyper_parameters that multiply": (
        lambda c: {"hyper_parameters": c["hyper_parameters"] | {"model_kwargs": {"a": nested(20)}}}, "values"),
    "hyper_parameters without end": (
        lambda c: {"hyper_parameters": c["hyper_parameters"] | {"model_kwargs": {"a": endless()}}}, "values"),
    "class_names that are no texts": (lambda c: {"class_names": list(range(10))}, "class_names"),
    "too many class_names": (lambda c: {"class_names": ["x"] * 11}, "11 class_names"),
    "a global_step that is a text": (lambda c: {"global_step": "1; rm"}, "global_step"),
    "callbacks that are a list": (lambda c: {"callbacks": [1]}, "callbacks"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_checkpoint_is_refused(name, cwd, content, etflight_command):
    change, word = MALFORMED[name]
    torch.save({**content, **change(content)}, "c.ckpt")
    assert_refused(etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd), cwd, word)
    with pytest.raises(UserError, match=word):
        Classifier.load_from_checkpoint("c.ckpt")


RESUMED = {
    "loops": {"fit_loop": 3},
    "optimizer_states": [{"state": {}, "param_groups": "all"}],
    "lr_schedulers": "none",
    "callbacks": {
        "NeuralCollapseMonitor{'space': 'embedding', 'head': 'head', 'online': False}": {"epochs": 3, "history": [1]}
    },
    "pytorch-lightning_version": "evil",
    "etflight": {"ranks": 3},
    "epoch": None,
}


@pytest.mark.parametrize("key", RESUMED)
def test_a_malformed_training_state_is_refused(key, cwd, last, etflight_command):
    torch.save({**last, key: RESUMED[key]}, "c.ckpt")
    monitor = ["--trainer.callbacks", "etflight.callbacks.NeuralCollapseMonitor"]
    assert_refused(etflight_command(*resume(), *monitor, cwd=cwd), cwd)


COUNTERS = {
    "loops of nothing": (lambda loops: {}, "loops lacks fit_loop"),
    "a counter that is a text": (lambda loops: count(loops, "epoch_progress", "x"), "completed is 'x'"),
    "a counter below zero": (lambda loops: count(loops, "epoch_loop.batch_progress", -1), "completed is -1"),
    "no counter": (lambda loops: {"fit_loop": loops["fit_loop"] | {"epoch_progress": {}}}, "epoch_progress lacks current"),
}  # fmt: skip


def count(loops, name, value):
    current = {"current": loops["fit_loop"][name]["current"] | {"completed": value}}
    return {"fit_loop": loops["fit_loop"] | {name: loops["fit_loop"][name] | current}}


@pytest.mark.parametrize("name", COUNTERS)
def test_counters_that_are_none_are_named(name, cwd, last, etflight_command):
    change, words = COUNTERS[name]
    torch.save({**last, "loops": change(last["loops"])}, "c.ckpt")
    assert_refused(etflight_command(*resume(), cwd=cwd), cwd, "c.ckpt is not one of etflight's, or is damaged", words)


def test_settings_of_a_data_module_in_a_checkpoint_are_not_read(cwd, content, etflight_command):
    torch.save(
        {**content, "datamodule_hyper_parameters": spec("evilmod.fn"), "datamodule_hparams_name": "evilmod.fn"},
        "c.ckpt",
    )
    result = etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd)
    assert result.status == 0, result.err
    assert not [trace for trace in TRACES if (cwd / trace).exists()]


@pytest.mark.parametrize("outside", ["runs/n/checkpoints/../../../thesis", "file:///thesis", "simplecache::thesis"])
def test_the_state_of_callbacks_deletes_nothing(outside, cwd, last, etflight_command):
    """Lightning deletes, folders with all that is in them, what the state calls the checkpoint before the next one."""
    Path("thesis").mkdir()
    Path("thesis/chapter").write_text("years of work")
    folder = "runs/n/checkpoints"
    state = {
        "monitor": None, "best_model_score": None, "best_model_path": outside, "current_score": None, "dirpath": "",
        "best_k_models": {}, "kth_best_model_path": "", "kth_value": torch.tensor(0.0), "last_model_path": "",
    }  # fmt: skip
    torch.save({**last, "callbacks": {ModelCheckpoint(dirpath=folder).state_key: state}}, "c.ckpt")
    argv = [*resume(), "--name", "n", "--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", folder]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, outside)
    assert Path("thesis/chapter").read_text() == "years of work"


def test_a_checkpoint_that_unpacks_to_more_than_its_size_is_refused(cwd, content):
    torch.save(content, "plain.ckpt")
    with zipfile.ZipFile("plain.ckpt") as plain, zipfile.ZipFile("c.ckpt", "w", zipfile.ZIP_DEFLATED) as packed:
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
        packed.writestr("archive/data/zeros", bytes(2**24))
    with pytest.raises(UserError, match="unpacks to more"):
        Classifier.load_from_checkpoint("c.ckpt")


def test_a_tensor_larger_than_what_is_stored_is_refused(cwd, content):
    torch.save({**content, "state_dict": {"x": torch.zeros(10_000)}}, "plain.ckpt")
    with zipfile.ZipFile("plain.ckpt") as plain, zipfile.ZipFile("c.ckpt", "w") as cut:
        for member in plain.infolist():
            data = plain.read(member)
            cut.writestr(member.filename, data[:4] if len(data) == 40_000 else data)
    with pytest.raises(UserError, match=r"c\.ckpt is truncated or damaged"):
        Classifier.load_from_checkpoint("c.ckpt")


def test_files_in_the_current_folder_take_the_place_of_no_package(cwd):
    """A folder that somebody else packed may hold a `wandb.py` beside the checkpoint."""
    for name in ("wandb", "yaml", "timm", "colorsys"):
        Path(f"{name}.py").write_text(EVIL_MODULE)
    code = "import sys; sys.argv = ['etflight', 'report', 'nowhere']; from etflight.__main__ import run; run(); import colorsys, yaml"
    # -P: without the current folder, as the installed command is started
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    assert done.stderr.startswith("etflight: error: ")
    assert not (cwd / "imported").exists()


def test_a_files_text_commands_no_terminal(cwd, content, etflight_command):
    hyper_parameters = content["hyper_parameters"] | {"head": spec("evilmod.\x1b]0;owned\x07\x1b[2J")}
    torch.save({**content, "hyper_parameters": hyper_parameters}, "c.ckpt")
    result = etflight_command(*stage("test"), "--ckpt_path", "c.ckpt", cwd=cwd)
    assert_refused(result, cwd)
    assert "\x1b" not in result.err


# --- images in one file ----------------------------------------------------------------------------------------------------


def write_npz(members, path="a.npz", compression=zipfile.ZIP_STORED):
    images, labels = io.BytesIO(), io.BytesIO()
    np.save(images, np.zeros((20, 4, 4), np.uint8))
    np.save(labels, np.arange(20) % 2)
    whole = {
        f"{split}_{kind}.npy": data.getvalue()
        for split in ("train", "test")
        for kind, data in (("images", images), ("labels", labels))
    }
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (whole | members).items():
            archive.writestr(name, data)


def npy(descr, shape, data=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


HOSTILE_ARRAYS = {
    "pickled objects": ({"train_labels.npy": npy("|O", (20,), pickle.dumps(Bomb()))}, "pickle"),
    "a shape of terabytes": ({"train_images.npy": npy("|u1", (10**9, 32, 32, 3), b"x" * 100)}, "100 bytes"),
    "an item of gigabytes": ({"train_images.npy": npy("|V2000000000", (20,), b"x")}, "1 bytes"),
    "code in the header": ({"train_images.npy": npy("|u1", "__import__('evilmod').fn()")}, "train_images"),
    "nesting in the header": ({"train_images.npy": npy("|u1", "(" * 5000)}, "train_images"),
    "a label of trillions": ({"train_labels.npy": npy("<i8", (20,), np.full(20, 2**40).tobytes())}, str(2**40)),
    "a negative shape": ({"train_images.npy": npy("|u1", (-20, -4, 4), bytes(320))}, "train_images"),
    "no array": ({"train_images.npy": b"hello"}, "train_images"),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_a_hostile_array_is_refused_before_memory_is_set_aside(name, cwd, etflight_command):
    members, word = HOSTILE_ARRAYS[name]
    write_npz(members)
    argv = ["fit", *SMALL, "--model.backbone", "resnet20_cifar", "--data", "ArrayImages", "--data.path", "a.npz"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, "a.npz", word)


def test_an_array_that_unpacks_to_a_thousand_times_its_size_is_refused(cwd):
    size = 2**28 + 2**20
    with zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("train_images.npy", "w", force_zip64=True) as member:
            member.write(npy("|u1", (size // 1024, 32, 32)))
            for _ in range(size // 2**20):
                member.write(bytes(2**20))
        archive.writestr("train_labels.npy", npy("<i8", (size // 1024,), bytes(8 * (size // 1024))))
    assert Path("a.npz").stat().st_size < size / 500
    with pytest.raises(UserError, match=r"a\.npz: train_images says it unpacks from .* refused"):
        ArrayImages("a.npz").load("train")


def test_members_that_leave_their_folder_are_not_unpacked(cwd):
    Path("in").mkdir()
    write_npz(
        {"../escaped.npy": npy("|u1", (1,), b"x"), "/tmp/etflight_escaped.npy": npy("|u1", (1,), b"x")}, "in/a.npz"
    )
    before = set(cwd.rglob("*"))
    data = ArrayImages("in/a.npz")
    data.setup("fit")
    assert len(data.split("train")) == 20
    assert set(cwd.rglob("*")) == before
    assert not Path("/tmp/etflight_escaped.npy").exists()


def test_a_truncated_npz_is_refused(cwd, etflight_command):
    write_npz({})
    data = Path("a.npz").read_bytes()
    Path("a.npz").write_bytes(data[: len(data) // 2])
    assert_refused(
        etflight_command(*stage("fit")[:1], *SMALL, "--data", "ArrayImages", "--data.path", "a.npz", cwd=cwd),
        cwd,
        "a.npz",
    )


def test_an_idx_file_that_unpacks_to_a_thousand_times_its_size_is_refused(cwd):
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**30, 4, 4)
    file = Path("images.gz")
    file.write_bytes(gzip.compress(header + bytes(1000)))
    with pytest.raises(UserError, match=r"images\.gz says it unpacks from"):
        read_idx(file, 3)


# --- image files -----------------------------------------------------------------------------------------------------------


def png(width, height, rows=1):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(3 * width)) * rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def jpeg(width, height):
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    data = bytearray(stream.getvalue())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(ran) (w) file closefile\n%%EOF\n"
BOMBS = {
    "60000x60000.png": (png(60_000, 60_000), "pixels"),
    "10000x10000.png": (png(10_000, 10_000), "pixels"),  # for which Pillow only warns
    "60000x60000.jpg": (jpeg(60_000, 60_000), "pixels"),
    "line.png": (png(10_000_000, 1), "10000000×1"),  # few pixels, until its shorter side is resized
    "postscript.png": (POSTSCRIPT, "none of JPEG, PNG"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_image_bomb_is_refused_before_it_is_decoded(name, cwd, etflight_command, monkeypatch):
    data, word = BOMBS[name]
    for folder in ("train/a", "train/b", "test/a", "test/b"):
        (cwd / "images" / folder).mkdir(parents=True)
        (cwd / "images" / folder / name).write_bytes(data)
    argv = ["fit", *SMALL, "--model.backbone", "resnet20_cifar", "--data", "FolderImages", "--data.root", "images"]
    decoded = []
    monkeypatch.setattr(torchcodec.decoders, "decode_image", lambda source, mode: decoded.append(source))
    with pytest.raises(UserError, match=name):
        FileSource(Paths("images", [f"train/a/{name}"]), torch.tensor([0]), Square(8))[0]
    assert decoded == []
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, name, word)


# --- configuration files ---------------------------------------------------------------------------------------------------


def laughs(start, pattern):
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i + 1}: &a{i + 1} {pattern % ', '.join([f'*a{i}'] * 9)}" for i in range(12)]
    return "\n".join(lines)


HOSTILE_YAML = {
    "a call": "model: !!python/object/apply:evilmod.fn []",
    "a command": "name: !!python/object/apply:os.system ['touch ran']",
    "a new object": "model: !!python/object/new:evilmod.Evil {}",
    "a name": "model: !!python/name:evilmod.fn",
    "a module": "model: !!python/module:evilmod",
    "aliases that multiply": laughs("[x]", "[%s]"),
    "merges that multiply": laughs("{x: 1}", "{<<: [%s]}"),
    "an alias of itself": "model: &a [*a]",
    "nesting without end": "model: " + "[" * 3000,
    "no text": "\x00\x01",
}


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *((name, "--config") for name in HOSTILE_YAML),
        *((name, "file within") for name in ("a call", "aliases that multiply")),
    ],
)
def test_hostile_yaml_is_refused(name, place, cwd, etflight_command):
    Path("c.yaml").write_text(HOSTILE_YAML[name])
    given = {"--config": ["-c", "c.yaml"], "file within": ["--model", "c.yaml"]}
    assert_refused(etflight_command(*stage("fit"), *given[place], cwd=cwd), cwd)


def test_collapse_reads_no_hostile_yaml(cwd, etflight_command):
    for name in ("a call", "aliases that multiply"):
        Path("c.yaml").write_text(HOSTILE_YAML[name])
        assert_refused(etflight_command("collapse", "--timm", "resnet18", "--data", "c.yaml", cwd=cwd), cwd)


# --- archives --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", ["../escaped", "data/../../escaped", "link"])
def test_a_downloaded_archive_leaves_its_folder_in_no_way(member, cwd, monkeypatch):
    """The checksum comes first; this is what happens to an archive that has the right one."""
    Path("data").mkdir()
    with tarfile.open("data/set.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(member)
        if member == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "../.."
            archive.addfile(info)
            info = tarfile.TarInfo("link/escaped")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"hello"))

    class Published:
        """Downloads nothing, but unpacks as torchvision's sets do."""

        def __init__(self, root, download):
            extract_archive("data/set.tar.gz", "data")

    monkeypatch.setattr(FashionMNIST, "published", Published)
    monkeypatch.setattr(FashionMNIST, "system_folder", "nowhere")
    own = tarfile.TarFile.extraction_filter
    with pytest.raises(UserError, match="refused") as caught:
        FashionMNIST("data", download=True).prepare_data()
    assert "\n" not in str(caught.value)
    assert {p.name for p in cwd.iterdir()} == {"data", "evilmod.py"}
    assert tarfile.TarFile.extraction_filter is own


# --- what the other commands read ------------------------------------------------------------------------------------------

HOSTILE_RESULTS = {
    "a list": b"[1]",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "nesting": b"[" * 100_000,
    "a text for a number": b'{"test/acc": "[red]evil"}',
    "a number without bound": b'{"test/acc": 1' + b"0" * 400 + b"}",
    "a list for a number": b'{"test/acc": [1]}',
}


@pytest.mark.parametrize("name", HOSTILE_RESULTS)
def test_report_refuses_hostile_results(name, cwd, etflight_command):
    Path("r").mkdir()
    Path("r/test_metrics.json").write_bytes(HOSTILE_RESULTS[name])
    Path("r/run.json").write_text("{}")
    assert_refused(etflight_command("report", "r", cwd=cwd), cwd, "test_metrics.json")


def test_report_prints_text_as_it_is(cwd, etflight_command):
    Path("r").mkdir()
    Path("r/test_metrics.json").write_text('{"test/acc": 0.5}')
    Path("r/run.json").write_text(json.dumps({"seed": "[/red]\x1b[2J"}))
    result = etflight_command("report", "r", cwd=cwd)
    assert result.status == 0, result.err
    assert "[/red]" in result.out
    assert "\x1b[2J" not in result.out


def safetensors_file(header, data=b""):
    return struct.pack("<Q", len(header)) + header + data


HOSTILE_WEIGHTS = {
    "code.pth": lambda: save_zip({}, "code.pth"),
    "legacy.pth": lambda: save_legacy({}, "legacy.pth"),
    "bare.pth": lambda: save_bare_pickle({}, "bare.pth"),
    "list.pth": lambda: torch.save([1, 2], "list.pth"),
    "number.pth": lambda: torch.save({"state_dict": 3}, "number.pth"),
    "text.pth": lambda: Path("text.pth").write_text("hello"),
    "objects.npz": lambda: save_numpy({}, "objects.npz"),
    "text.safetensors": lambda: Path("text.safetensors").write_text("hello, hello"),
    "long.safetensors": lambda: Path("long.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}"),
    "outside.safetensors": lambda: Path("outside.safetensors").write_bytes(
        safetensors_file(
            b'{"fc.weight": {"dtype": "F32", "shape": [1000000, 1000000], "data_offsets": [0, 4000000000000]}}', b"x"
        )
    ),
}


@pytest.mark.parametrize("name", HOSTILE_WEIGHTS)
def test_collapse_refuses_hostile_weights(name, cwd, etflight_command):
    HOSTILE_WEIGHTS[name]()
    argv = ["collapse", "--timm", "resnet18", "--weights", name, "--data", "Digits"]
    assert_refused(etflight_command(*argv, cwd=cwd), cwd, name)


# --- known vulnerabilities -------------------------------------------------------------------------------------------------

REPORT = '{"dependencies": [%s], "fixes": []}'
SOUND = '{"name": "a", "version": "1", "vulns": []}'
FLAWED = '{"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}'
UNKNOWN = '{"name": "c", "skip_reason": "not found"}'


@pytest.mark.parametrize(
    ("report", "log", "status", "expected", "said"),
    [
        (f"{SOUND}, {UNKNOWN}", "", 0, 0, "no known vulnerability in 1 packages; 1 are unknown"),
        (f"{SOUND}, {FLAWED}", "Found 1 known vulnerability", 1, 1, "b 2: CVE-1, mended in 2.1"),
        (FLAWED, "", 0, 1, "CVE-1"),
        (SOUND, "", 3, 3, ""),
        (UNKNOWN, "", 0, 0, "notice: the vulnerability service knows none"),
        (
            None,
            "requests.exceptions.ConnectionError: Max retries exceeded",
            1,
            0,
            "notice: the vulnerability service cannot be reached",
        ),
        (None, "requests.exceptions.ReadTimeout: read timed out", 1, 0, "cannot be reached"),
        (None, "TypeError: a bug", 1, 1, "TypeError: a bug"),
        (None, "", 0, 1, "without a report"),
    ],
)
def test_the_audit_tells_a_vulnerability_from_a_silent_network(report, log, status, expected, said, tmp_path):
    tool = tmp_path / "pip-audit"
    written = (
        ""
        if report is None
        else f"while [ $# -gt 0 ]; do [ $1 = --output ] && echo '{REPORT % report}' > $2; shift; done\n"
    )
    tool.write_text(f"#!/bin/bash\n{written}echo '{log}' >&2\nexit {status}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    os.symlink(sys.executable, tmp_path / "python")
    done = subprocess.run([ROOT / ".ci/audit", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    assert said in done.stdout
