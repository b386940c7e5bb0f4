"""Hostile files are refused in one line; nothing in them is imported, run, fetched or deleted.

Every payload leaves a file behind if it is imported or run; `test_the_payloads_work` shows that it would.
"""

import gzip
import io
import json
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torchvision.datasets.utils import extract_archive

from etflight import Classifier, LinearHead
from etflight.data import ArrayImages, FashionMNIST
from etflight.data.sets import read_idx
from etflight.utils.errors import UserError
from etflight.utils.limits import refuse_names
from tests.hostile import Bomb, save_packed
from tests.training import ONE_BATCH, QUICK, save_arrays

ROOT = Path(__file__).parents[2]
TRACES = ("imported", "ran")
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


@pytest.fixture
def cwd(tmp_path, monkeypatch):
    """The current folder, with a module that leaves a trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("evilmod.py").write_text(EVIL_MODULE)
    return tmp_path


@pytest.fixture(scope="module")
def content():
    model = Classifier(10, "resnet20_cifar", in_chans=1)
    return {
        "state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "epoch": 0, "global_step": 0,
        "pytorch-lightning_version": "2.6.6",
    }  # fmt: skip


@pytest.fixture(scope="module")
def last(etflight_command, tmp_path_factory):
    """What a real run has saved."""
    folder = tmp_path_factory.mktemp("run")
    etflight_command(*stage("fit"), "--name", "r", "--model.backbone", "resnet20_cifar", cwd=folder).ran()
    return torch.load(folder / "runs/r/checkpoints/last.ckpt", weights_only=True)


def stage(name):
    return [name, "--data", "Digits", *QUICK, *ONE_BATCH]


RESUME = [*stage("fit"), "--trainer.max_epochs", 2, "--ckpt_path", "c.ckpt"]
TEST = [*stage("test"), "--ckpt_path", "c.ckpt"]


def spec(path, **init_args):
    return {"class_path": path, "init_args": init_args}


def assert_no_trace():
    assert not [trace for trace in TRACES if Path(trace).exists()]
    assert "evilmod" not in sys.modules


def assert_refused(result, *words):
    result.assert_refused(*words)
    assert len(result.err) < 2000
    assert_no_trace()


def test_the_payloads_work(cwd, content, etflight_command):
    torch.save({**content, "bomb": Bomb()}, "c.ckpt")
    torch.load("c.ckpt", weights_only=False)
    Path("ran").unlink()
    own = etflight_command(*stage("fit"), "--model.backbone", "resnet20_cifar", "--model.head", "evilmod.Evil", cwd=cwd)
    assert own.status == 1  # dot regression cannot train it; the module was the user's own word, so it was imported
    assert Path("imported").exists()
    assert Path("ran").exists()


# --- checkpoints -------------------------------------------------------------------------------------------------------


def save_half(content):
    torch.save(content, "c.ckpt")
    whole = Path("c.ckpt").read_bytes()
    Path("c.ckpt").write_bytes(whole[: len(whole) // 2])


def holds(**changes):
    """A writer of a checkpoint with other entries."""
    return lambda content: torch.save({**content, **changes}, "c.ckpt")


def asks_for(**hyper_parameters):
    """A writer of a checkpoint with other hyper-parameters."""
    return lambda c: torch.save({**c, "hyper_parameters": c["hyper_parameters"] | hyper_parameters}, "c.ckpt")


def weights(change):
    """A writer of a checkpoint with every tensor of the state dict changed."""
    return lambda c: torch.save({**c, "state_dict": {k: change(v) for k, v in c["state_dict"].items()}}, "c.ckpt")


def nested(levels):
    value = ["x"]
    for _ in range(levels):
        value = [value] * 10
    return value


def endless():
    value = []
    value.append(value)
    return value


SCHEDULES = "torch.optim.lr_scheduler"
CODE = {  # files that run code when they are unpickled
    "zip": (holds(bomb=Bomb()), ".ckpt"),
    "pickle": (lambda c: Path("c.ckpt").write_bytes(pickle.dumps(Bomb(), 4)), ".ckpt"),
}  # fmt: skip
FOREIGN = {  # what is no checkpoint of ours
    "a state dict of torch.save": (lambda c: torch.save(c["state_dict"], "c.ckpt"), "c.ckpt"),
    "the hyper-parameters of another module": (holds(hyper_parameters={"lr": 0.1}), "num_classes"),
    "another hyper-parameter": (asks_for(lr=0.1), "'lr'"),
    "a zip file cut short": (save_half, "c.ckpt"),
    "a text": (lambda c: Path("c.ckpt").write_text("epoch,loss\n1,0.5\n"), "c.ckpt"),
    "nothing": (lambda c: None, "c.ckpt"),
}  # fmt: skip
NAMED = {  # plain data that name code
    "a function of the system": (asks_for(head=spec("os.system", command="touch ran")), "os.system"),
    "a module on disk": (asks_for(head=spec("evilmod.fn")), "evilmod.fn"),
    "a class on disk": (asks_for(head=spec("evilmod.Evil")), "evilmod.Evil"),
    "torch.hub": (asks_for(loss=spec("torch.hub.load", repo_or_dir=".", model="fn", source="local")), "torch.hub.load"),
    "an imported class of another kind": (asks_for(head=spec("etflight.DotRegressionLoss")), "DotRegressionLoss"),
    "an abstract class": (asks_for(head=spec("etflight.Head")), "Head"),
    "a class path in its arguments": (asks_for(head=spec("etflight.ETFHead", scale=spec("evilmod.fn"))), "evilmod"),
    "a function as text": (asks_for(lr_scheduler=spec(f"{SCHEDULES}.LambdaLR", lr_lambda="evilmod.fn")), "evilmod.fn"),
    "a class as text": (asks_for(optimizer=spec("torch.optim.SGD", lr="evilmod.Evil")), ""),
    "a class in place of a specification": (asks_for(head="evilmod.Evil"), ""),
    "arguments that are no names": (asks_for(head=spec("etflight.ETFHead") | {"init_args": [1]}), ""),
    "model_kwargs with a class path as text": (asks_for(model_kwargs={"act_layer": "{class_path: evilmod.Evil}"}), "evilmod"),
    "model_kwargs as text": (asks_for(model_kwargs="{act_layer: {class_path: evilmod.Evil}}"), "evilmod"),
    "an instantiator": (asks_for(_instantiator="evilmod.fn", head=spec("evilmod.fn")), "evilmod.fn"),
    "a class of its own": (asks_for(_class_path="evilmod.Evil"), "_class_path"),
    "a backbone from the hub": (asks_for(backbone="hf-hub:evil/model"), "hf-hub:evil/model"),
    "a backbone that is no text": (asks_for(backbone=["evilmod"]), ""),
}  # fmt: skip
MALFORMED = {  # plain data of the wrong shape
    "state_dict of another model": (holds(state_dict={"x": torch.ones(1)}), "weights"),
    "huge tensors without storage": (weights(lambda value: torch.zeros(1).expand(10**12)), "weights"),
    "state_dict of no tensors": (holds(state_dict={"x": 1}), "state_dict"),
    "hyper_parameters that multiply": (asks_for(model_kwargs={"a": nested(20)}), "values"),
    "hyper_parameters without end": (asks_for(model_kwargs={"a": endless()}), "values"),
    "class_names that are no texts": (holds(class_names=list(range(10))), "class_names"),
    "a global_step that is a text": (holds(global_step="1; rm"), "global_step"),
    "more than its size when unpacked": (lambda c: save_packed(c | {"zeros": torch.zeros(2**22)}, "c.ckpt"), "c.ckpt"),
}  # fmt: skip
ATTACKS = CODE | FOREIGN | NAMED | MALFORMED


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_checkpoint_is_refused_by_the_command_line_and_by_python(attack, cwd, content, etflight_command):
    Path("hubconf.py").write_text(EVIL_MODULE)
    write, words = ATTACKS[attack]
    write(content)
    assert_refused(etflight_command(*TEST, cwd=cwd), words)
    with pytest.raises(UserError) as caught:
        Classifier.load_from_checkpoint("c.ckpt")
    assert "\n" not in str(caught.value)
    assert_no_trace()


READERS = {
    "fit": RESUME,
    "validate": [*stage("validate"), "--ckpt_path", "c.ckpt"],
    "predict": [*stage("predict"), "--ckpt_path", "c.ckpt"],
    "predict image files": ["predict", "--images", "a.png", "--output", "p.csv", "--ckpt_path", "c.ckpt"],
    "collapse": ["collapse", "c.ckpt", "--data", "Digits"],
    "export": ["export", "c.ckpt", "--output", "exported"],
    "the last of a run": [*stage("test"), "--name", "r", "--ckpt_path", "last"],
}


@pytest.mark.parametrize("reader", READERS)
def test_whatever_reads_a_checkpoint_refuses_it_and_leaves_nothing(reader, cwd, content, etflight_command):
    Image.new("RGB", (8, 8)).save("a.png")
    saved = Path("runs/r/checkpoints/last.ckpt")
    saved.parent.mkdir(parents=True)
    for attack in ("another hyper-parameter", "pickle"):
        write, words = ATTACKS[attack]
        write(content)
        saved.write_bytes(Path("c.ckpt").read_bytes())
        before = set(cwd.rglob("*"))
        result = etflight_command(*READERS[reader], cwd=cwd)
        assert_refused(result, words)
        assert result.err.count("\n") == 1, result.err  # no warnings around it
        assert set(cwd.rglob("*")) == before
    if reader in ("fit", "collapse"):  # both have a parser of their own
        NAMED["a function as text"][0](content)
        assert_refused(etflight_command(*READERS[reader], cwd=cwd), "evilmod.fn")


def test_no_checkpoint_is_fetched_from_elsewhere(cwd, content, etflight_command):
    CODE["zip"][0](content)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        http = f"http://127.0.0.1:{listener.getsockname()[1]}/c.ckpt"
        Path("a.yaml").write_text(f"ckpt_path: {http}\n")
        assert_refused(etflight_command(*stage("test"), "-c", "a.yaml", cwd=cwd), "download it first")
        others = (f"file://{cwd}/c.ckpt", "s3://bucket/c.ckpt", f"simplecache::{http}", "registry:user/model")
        for url in (http, *others):
            assert_refused(etflight_command(*stage("test"), "--ckpt_path", url, cwd=cwd), "download it first")
            with pytest.raises(UserError, match="download it first"):
                Classifier.load_from_checkpoint(url)
        listener.settimeout(0)
        with pytest.raises(BlockingIOError):  # nobody has called
            listener.accept()


def test_lightning_takes_no_file_for_a_url_or_a_name_of_its_own(cwd, content, etflight_command):
    torch.save(content, "best")
    Path("http").mkdir()
    torch.save(content, "http/c.ckpt")  # Lightning fetches whatever starts with http
    for path in ("best", "http/c.ckpt"):
        result = etflight_command(*stage("test"), "--ckpt_path", path, "--name", path[:4], cwd=cwd).ran()
        assert str(cwd / path) in result.err + result.out


def test_options_before_the_stage_bring_no_checkpoint_past_the_check(cwd, content, etflight_command):
    CODE["zip"][0](content)
    Path("c.yaml").write_text("test: {ckpt_path: c.ckpt, data: Digits}\n")
    assert_refused(etflight_command("--config", "c.yaml", "test", cwd=cwd))


def test_a_checkpoints_arguments_for_a_class_that_the_user_names_are_checked_too(cwd, content, etflight_command):
    Path("my_heads.py").write_text(
        "from etflight import LinearHead\n"
        "class MyHead(LinearHead):\n"
        "    def __init__(self, in_features, num_classes, *, transform=None):\n"
        "        super().__init__(in_features, num_classes)\n"
    )
    asks_for(head=spec("my_heads.MyHead", transform="{class_path: evilmod.Evil, init_args: {}}"))(content)
    assert_refused(etflight_command(*TEST, "--model.head", "my_heads.MyHead", cwd=cwd), "evilmod.Evil", "transform")


def test_texts_that_can_only_be_texts_are_taken():
    class Mine(LinearHead):
        def __init__(
            self, *, path: str, mode: str | None = None, kind=None, names: list[str] | None = None
        ) -> None: ...

    refuse_names(Mine, {"path": "{a: b.c}", "mode": "x.y", "kind": "word", "names": ["a.b"]}, "head")
    for value in ("a.b", "{a: b}", ["c d"], {"k": {"k.k": 1}}):
        with pytest.raises(UserError, match="could name code"):
            refuse_names(Mine, {"kind": value}, "head")


def leave_run(data):
    """As much of a run folder as `describe` reads."""
    Path("r").mkdir()
    Path("r/config.yaml").write_text(json.dumps({"data": data}))
    Path("r/metrics.csv").touch()


@pytest.mark.parametrize(
    "data",
    [
        "evilmod.Evil",
        spec("evilmod.Evil"),
        spec("Digits", sampler="evilmod.fn"),
        spec("etflight.data.ClassSubset", images="evilmod.Evil", classes=[0]),
        spec("etflight.data.ClassSubset", images=spec("evilmod.Evil"), classes=[0]),
        {**spec("Digits"), "dict_kwargs": spec("evilmod.Evil")},
    ],
)
def test_data_that_a_run_names_are_not_imported(data, cwd, etflight_command):
    leave_run(data)
    assert_refused(etflight_command("describe", "r", cwd=cwd))


def test_data_that_a_run_names_are_taken_from_the_user(cwd, etflight_command):
    Path("mine.py").write_text("from etflight.data import Digits\nclass Mine(Digits):\n    pass\n")
    leave_run("mine.Mine")
    etflight_command("describe", "r", cwd=cwd).assert_refused("'mine.Mine'", "-c r/config.yaml")
    assert "mine" not in sys.modules
    etflight_command("describe", "r", "-c", "r/config.yaml", cwd=cwd).ran()
    etflight_command("describe", "r", "--imports", "mine", cwd=cwd).ran()


def test_a_backbone_from_elsewhere_is_taken_from_the_user(cwd, content, etflight_command):
    Path("mine").mkdir()
    Path("mine/config.json").write_text('{"architecture": "resnet20_cifar"}')
    asks_for(backbone="local-dir:mine")(content)
    etflight_command(*TEST, "--model.backbone", "local-dir:mine", cwd=cwd).ran()
    assert Classifier.load_from_checkpoint("c.ckpt", backbone="local-dir:mine").hparams["backbone"] == "local-dir:mine"


def test_other_weights_and_the_settings_of_a_data_module_are_not_taken(cwd, content, etflight_command):
    """Not even where the user's own configuration says `pretrained: true`, as the one that trained it did."""
    torch.save(Bomb(), "weights.pth")
    overlay = {"file": "weights.pth", "url": "http://127.0.0.1:9/x"}
    model_kwargs = {"checkpoint_path": "weights.pth", "pretrained_cfg_overlay": overlay}
    hyper_parameters = content["hyper_parameters"] | {"pretrained": True, "model_kwargs": model_kwargs}
    data = {"datamodule_hyper_parameters": spec("evilmod.fn"), "datamodule_hparams_name": "evilmod.fn"}
    holds(hyper_parameters=hyper_parameters, **data)(content)
    model = Classifier.load_from_checkpoint("c.ckpt")
    assert model.hparams["pretrained"] is False
    assert model.hparams["model_kwargs"] == {"pretrained_cfg_overlay": {}}
    etflight_command(*TEST, cwd=cwd).ran()
    assert_no_trace()


def of_the_monitor(state):
    return {"callbacks": {"NeuralCollapseMonitor{'space': 'embedding', 'head': 'head', 'online': False}": state}}


RESUMED = {
    "a loop that is a number": ({"loops": {"fit_loop": 3}}, ""),
    "optimizer states of nothing": ({"optimizer_states": [{"state": {}, "param_groups": "all"}]}, ""),
    "the monitor's state": (of_the_monitor({"epochs": 3, "history": [1]}), ""),
    "a version that is none": ({"pytorch-lightning_version": "evil"}, "evil"),
    "random states of nothing": ({"etflight": {"ranks": 3}}, ""),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_malformed_training_state_is_refused(name, cwd, last, etflight_command):
    change, words = RESUMED[name]
    torch.save({**last, **change}, "c.ckpt")
    monitor = ["--trainer.callbacks", "etflight.callbacks.NeuralCollapseMonitor"]
    assert_refused(etflight_command(*RESUME, *monitor, cwd=cwd), words)


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
    argv = [*RESUME, "--name", "n", "--trainer.callbacks", "ModelCheckpoint", "--trainer.callbacks.dirpath", folder]
    assert_refused(etflight_command(*argv, cwd=cwd), outside)
    assert Path("thesis/chapter").read_text() == "years of work"


def test_files_in_the_current_folder_take_the_place_of_no_package(cwd):
    """A folder that somebody else packed may hold a `wandb.py` beside the checkpoint."""
    for name in ("wandb", "yaml", "timm", "colorsys"):
        Path(f"{name}.py").write_text(EVIL_MODULE)
    code = "import sys; sys.argv = ['etflight', 'report', 'nowhere']; from etflight.__main__ import run; run(); import colorsys, yaml"
    # -P: without the current folder, as the installed command is started
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, cwd=cwd)
    assert done.stderr.startswith("etflight: error: ")
    assert not Path("imported").exists()


def test_the_text_of_a_file_commands_no_terminal(cwd, content, etflight_command):
    asks_for(head=spec("evilmod.\x1b]0;owned\x07\x1b[2J"))(content)
    result = etflight_command(*TEST, cwd=cwd)
    assert_refused(result)
    assert "\x1b" not in result.err


# --- images in one file ------------------------------------------------------------------------------------------------


def write_npz(members):
    """A sound file but for these members."""
    save_arrays("sound.npz", train=20, test=20, shape=(4, 4), classes=2)
    with zipfile.ZipFile("sound.npz") as sound, zipfile.ZipFile("a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sound.namelist():
            archive.writestr(name, members.get(name) or sound.read(name))


def npy(descr, shape, data=b""):
    header = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n" + data


HOSTILE_ARRAYS = {
    "pickled objects": ({"train_labels.npy": npy("|O", (20,), pickle.dumps(Bomb()))}, "pickle"),
    "a shape of terabytes": ({"train_images.npy": npy("|u1", (10**9, 32, 32, 3), b"x" * 100)}, "train_images"),
    "an item of gigabytes": ({"train_images.npy": npy("|V2000000000", (20,), b"x")}, "train_images"),
    "code in the header": ({"train_images.npy": npy("|u1", "__import__('evilmod').fn()")}, "train_images"),
    "nesting in the header": ({"train_images.npy": npy("|u1", "(" * 5000)}, "train_images"),
    "a label of trillions": ({"train_labels.npy": npy("<i8", (20,), np.full(20, 2**40).tobytes())}, str(2**40)),
}


@pytest.mark.parametrize("name", HOSTILE_ARRAYS)
def test_a_hostile_array_is_refused_before_memory_is_set_aside(name, cwd):
    members, word = HOSTILE_ARRAYS[name]
    write_npz(members)
    with pytest.raises(UserError, match=rf"a\.npz.*{word}|{word}.*a\.npz"):
        ArrayImages("a.npz").setup("fit")
    assert_no_trace()


def test_an_array_that_unpacks_to_a_thousand_times_its_size_is_refused(cwd):
    count = 2**18 + 2**10
    images, labels = npy("|u1", (count, 32, 32), bytes(1024 * count)), npy("<i8", (count,), bytes(8 * count))
    write_npz({"train_images.npy": images, "train_labels.npy": labels})
    with pytest.raises(UserError, match=r"a\.npz.*train_images.* refused"):
        ArrayImages("a.npz").load("train")
    header = bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**30, 4, 4)
    Path("images.gz").write_bytes(gzip.compress(header + bytes(1000)))
    with pytest.raises(UserError, match=r"images\.gz.* refused"):
        read_idx(Path("images.gz"), 3)


# --- configuration files -----------------------------------------------------------------------------------------------


def laughs(start, pattern):
    lines = [f"a0: &a0 {start}"]
    lines += [f"a{i + 1}: &a{i + 1} {pattern % ', '.join([f'*a{i}'] * 9)}" for i in range(12)]
    return "\n".join(lines)


HOSTILE_YAML = {
    "a call": "model: !!python/object/apply:evilmod.fn []",
    "a name": "model: !!python/name:evilmod.fn",
    "aliases that multiply": laughs("[x]", "[%s]"),
    "merges that multiply": laughs("{x: 1}", "{<<: [%s]}"),
    "an alias of itself": "model: &a [*a]",
    "nesting without end": "model: " + "[" * 3000,
    "no text": "\x00\x01",
}


@pytest.mark.parametrize("name", HOSTILE_YAML)
def test_hostile_yaml_is_refused(name, cwd, etflight_command):
    Path("c.yaml").write_text(HOSTILE_YAML[name])
    assert_refused(etflight_command(*stage("fit"), "-c", "c.yaml", cwd=cwd))
    if name == "a call":  # also in files within files
        assert_refused(etflight_command(*stage("fit"), "--model", "c.yaml", cwd=cwd))
        assert_refused(etflight_command("collapse", "--timm", "resnet18", "--data", "c.yaml", cwd=cwd))


# --- archives ----------------------------------------------------------------------------------------------------------


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
    with pytest.raises(UserError, match="the download failed") as caught:
        FashionMNIST("data", download=True).prepare_data()
    assert "\n" not in str(caught.value)
    assert {p.name for p in cwd.iterdir()} == {"data", "evilmod.py"}


# --- results -----------------------------------------------------------------------------------------------------------

HOSTILE_RESULTS = {
    "a list": b"[1]",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00",
    "nesting": b"[" * 100_000,
    "a text for a number": b'{"test/acc": "[red]evil"}',
    "a number without bound": b'{"test/acc": 1' + b"0" * 400 + b"}",
}


def test_report_refuses_hostile_results_and_prints_text_as_it_is(cwd, etflight_command):
    Path("r").mkdir()
    Path("r/run.json").write_text(json.dumps({"arm": "[/red]\x1b[2J"}))
    for content in HOSTILE_RESULTS.values():
        Path("r/test_metrics.json").write_bytes(content)
        assert_refused(etflight_command("report", "r", cwd=cwd), "test_metrics.json")
    Path("r/test_metrics.json").write_text('{"test/acc": 0.5}')
    result = etflight_command("report", "r", cwd=cwd).ran()
    assert "[/red]" in result.out
    assert "\x1b[2J" not in result.out


# --- known vulnerabilities ---------------------------------------------------------------------------------------------

SOUND = '{"name": "a", "version": "1", "vulns": []}'
FLAWED = '{"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["2.1"]}]}'


@pytest.mark.parametrize(
    ("report", "log", "status", "expected", "said"),
    [
        (SOUND, "", 0, 0, ""),
        (f"{SOUND}, {FLAWED}", "Found 1 known vulnerability", 1, 1, "CVE-1"),
        (SOUND, "", 3, 3, ""),
        ('{"name": "c", "skip_reason": "not found"}', "", 0, 0, "notice"),
        ("", "requests.exceptions.ReadTimeout: read timed out", 1, 0, "notice"),
        ("", "TypeError: a bug", 1, 1, "TypeError: a bug"),
    ],
)  # fmt: skip
def test_the_audit_tells_a_vulnerability_from_a_silent_network(report, log, status, expected, said, tmp_path):
    tool = tmp_path / "pip-audit"
    content = f'{{"dependencies": [{report}], "fixes": []}}' if report else ""
    write = f"while [ $# -gt 0 ]; do [ $1 = --output ] && printf '%s' '{content}' > $2; shift; done"
    tool.write_text(f"#!/bin/bash\n{write}\necho '{log}' >&2\nexit {status}\n")
    tool.chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    done = subprocess.run([ROOT / ".ci/audit", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == expected, done.stdout + done.stderr
    assert said in done.stdout
