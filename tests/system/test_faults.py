"""Faults of the world around a run: training goes on where it can; where it cannot, one line says what, where and the mend."""

import csv
import errno
import gzip
import hashlib
import json
import multiprocessing
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torchvision import datasets

from etflight.data import FashionMNIST, sets
from etflight.runs.folder import check_writable, lock
from etflight.utils.errors import UserError
from tests.cli.test_stages import QUICK
from tests.processes import ended, start
from tests.wandb_file import history

ROOT = Path(__file__).parents[2]
EPOCHS = 3
DIGITS = [
    "--data", "Digits", "--data.max_count", 10, "--model.backbone", "resnet20_cifar", *QUICK[2:],
    "--trainer.max_epochs", EPOCHS,
]  # fmt: skip
PICTURES = [
    "--trainer.callbacks+", "NeuralCollapseMonitor", "--trainer.callbacks+", "CollapseFigures",
    "--trainer.callbacks.every_n_epochs", 1,
]  # fmt: skip


def warnings_in(result):
    return [line for line in result.err.splitlines() if line.startswith("etflight: warning:")]


def rows_of(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


def assert_refused(result, *words):
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert not [word for word in words if word not in line], line
    assert "Traceback" not in result.err


@pytest.fixture(scope="module")
def alone(etflight_command, tmp_path_factory):
    """The folder of a run without a logger of the user's own."""
    cwd = tmp_path_factory.mktemp("alone")
    result = etflight_command("fit", *DIGITS, *PICTURES, "--name", "alone", cwd=cwd)
    assert result.status == 0, result.err
    return cwd / "runs/alone"


# --- a logger whose server is gone -------------------------------------------------------------------------------------


class Telegraph(Logger):
    """Appends a line per call to a file, until its server is gone.

    Args:
        lines: That are taken before; with none there never was a server.
    """

    def __init__(self, lines: int) -> None:
        super().__init__()
        self.left = lines
        self.served = lines > 0

    name = version = property(lambda self: "telegraph")

    @property
    def experiment(self):
        """A file."""
        if not self.served:
            raise ConnectionRefusedError("no server")
        return open("sent.jsonl", "a")

    def log_hyperparams(self, *_):
        pass

    @rank_zero_only
    def log_metrics(self, metrics, step=None):
        self._send({"step": step, **{name: float(value) for name, value in metrics.items()}})

    @rank_zero_only
    def log_image(self, key, images, step=None):
        self._send({"image": key, "step": step})

    @rank_zero_only
    def finalize(self, status):
        self._send({"status": status})

    def _send(self, content):
        with self.experiment as file:
            self.left -= 1
            if self.left < 0:
                raise ConnectionResetError("the server is gone")
            print(json.dumps(content), file=file)


# rows are the monitor's before training, those of epoch 0, its pictures, …
@pytest.mark.parametrize("lines", [0, 4, 1000])
def test_training_goes_on_without_a_logger_whose_server_is_gone(lines, alone, etflight_command, tmp_path):
    logger = ["--trainer.logger+", "tests.system.test_faults.Telegraph", "--trainer.logger.lines", lines]
    result = etflight_command("fit", *DIGITS, *PICTURES, *logger, "--name", "r", cwd=tmp_path)
    assert result.status == 0, result.err
    folder = tmp_path / "runs/r"
    assert (folder / "metrics.csv").read_text() == (alone / "metrics.csv").read_text()
    assert (folder / "figures/nc_curves.png").is_file()
    assert (folder / "checkpoints/last.ckpt").is_file()
    sent = tmp_path / "sent.jsonl"
    taken = [json.loads(line) for line in sent.read_text().splitlines()] if lines else []
    if lines < 1000:
        (warning,) = warnings_in(result)
        assert f"Telegraph fell silent ({'ConnectionResetError' if lines else 'ConnectionRefusedError'}" in warning
        assert "runs/r/metrics.csv" in warning
        assert len(taken) == lines
    else:
        assert warnings_in(result) == []
        # clock times go to loggers, not into metrics.csv
        numbers = [line for line in taken if not {"image", "status", "speed/images_per_s"} & line.keys()]
        assert [line["step"] for line in numbers] == [int(row["step"]) for row in rows_of(folder)]
        assert {line["image"] for line in taken if "image" in line} >= {"nc/curves", "nc/heat_map"}
        assert taken[-1] == {"status": "success"}


# --- Weights & Biases --------------------------------------------------------------------------------------------------

WANDB = [*DIGITS, "-c", ROOT / "configs/logger/wandb.yaml"]
ACCOUNT = {"WANDB_API_KEY": "0" * 40, "WANDB_INIT_TIMEOUT": "1", "WANDB_HTTP_TIMEOUT": "1"}


class WaitFor(Callback):
    """Lets training begin its second epoch once there is a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        while trainer.current_epoch == 1 and not self.path.exists():
            time.sleep(0.05)


def wait_for(path):
    return ["--trainer.callbacks+", "tests.system.test_faults.WaitFor", "--trainer.callbacks.path", path]


class WandbServer(BaseHTTPRequestHandler):
    """As much of W&B's server as a run needs that is never looked at; it keeps no connection open."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        project = {"id": "p", "name": "p", "entity": {"id": "e", "name": "me"}}
        bucket = {
            "id": "b", "name": (request.get("variables") or {}).get("name"), "displayName": "run", "description": "",
            "config": "{}", "sweepName": None, "historyLineCount": 0, "project": project,
        }  # fmt: skip
        viewer = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
        data = {"viewer": viewer, "upsertBucket": {"bucket": bucket, "inserted": True}, "serverInfo": {"features": []}}
        answer = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
        if self.path.endswith("/file_stream"):
            self.server.seen_rows.set()

    def log_message(self, *_):
        pass


def assert_all_is_to_be_synced(warning, cwd):
    """The folder that the warning says to upload holds the run, with every epoch."""
    folder = cwd / warning.rpartition("wandb sync ")[2]
    assert folder.is_relative_to(cwd / "runs/w"), warning
    (file,) = folder.glob("*.wandb")
    written = [float(row["train/loss"]) for row in rows_of(cwd / "runs/w") if row["train/loss"]]
    assert [row["train/loss"] for row in history(file) if "train/loss" in row] == pytest.approx(written)
    assert len(written) == EPOCHS


@pytest.mark.parametrize("server", ["refuses", "does not answer"])
def test_wandb_goes_on_offline_where_its_server_cannot_be_reached(server, etflight_command, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        if server == "refuses":
            listener.close()
        result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, WANDB_BASE_URL=address, **ACCOUNT)
    assert result.status == 0, result.err
    (warning,) = warnings_in(result)
    assert_all_is_to_be_synced(warning, tmp_path)


def test_wandb_keeps_what_a_server_that_went_away_has_not_taken(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.seen_rows = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    process = start(
        "etflight", "fit", *WANDB, *wait_for(tmp_path / "gone"), "--name", "w", cwd=tmp_path,
        **ACCOUNT | {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "15", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1"},
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
    )  # fmt: skip
    assert server.seen_rows.wait(120)
    server.shutdown()
    server.server_close()
    (tmp_path / "gone").touch()
    result = ended(process)
    assert result.status == 0, result.err
    (warning,) = warnings_in(result)
    assert "has not received everything" in warning
    assert_all_is_to_be_synced(warning, tmp_path)


def test_wandb_without_an_account_is_refused_before_training(etflight_command, tmp_path):
    home = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, **home)
    assert_refused(result, "wandb login", "WANDB_MODE=offline")
    assert not (tmp_path / "runs/w/metrics.csv").exists()


# --- a run folder that is not ours -------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("stage", "root"),
    [("fit", "notes.txt/runs"), ("fit", "notes.txt"), ("fit", "/proc/runs"), ("test", "notes.txt"), ("predict", "/proc")],
)  # fmt: skip
def test_a_run_folder_that_cannot_be_made_is_refused_before_work(stage, root, alone, etflight_command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    checkpoint = [] if stage == "fit" else ["--ckpt_path", alone / "checkpoints/last.ckpt"]
    argv = [stage, *DIGITS, *checkpoint, "--trainer.default_root_dir", root, "--name", "r"]
    option = "--output" if stage == "predict" else "--trainer.default_root_dir"
    assert_refused(etflight_command(*argv, cwd=tmp_path), f"folder {root}/r cannot be written to", option)
    assert contents(tmp_path) == {Path("notes.txt"): b"mine"}


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    folder = tmp_path / "theirs"
    folder.mkdir(mode=0o500)
    # the superuser may write anywhere, so that the kernel's answer to anybody else stands in here
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    with pytest.raises(UserError, match=r"theirs/run cannot be written to .*theirs is read-only"):
        check_writable(folder / "run")
    folder.chmod(0o700)
    check_writable(folder / "run")


@pytest.mark.parametrize("theirs", ["config.yaml", "metrics.csv"])
def test_a_folder_of_another_program_is_refused_and_stays_as_it_is(theirs, etflight_command, tmp_path):
    project = tmp_path / "runs/project"
    project.mkdir(parents=True)
    (project / theirs).write_text("years of work")
    result = etflight_command("fit", *DIGITS, "--name", "project", cwd=tmp_path)
    assert_refused(result, f"runs/project has a {theirs}", "--name")
    assert contents(tmp_path) == {Path(f"runs/project/{theirs}"): b"years of work"}


def test_a_run_killed_before_its_first_checkpoint_may_start_again(etflight_command, tmp_path):
    kill = ["--trainer.callbacks+", "tests.left_by_runs.Kill", "--trainer.callbacks.after", 0]
    assert etflight_command("fit", *DIGITS, *kill, "--name", "r", cwd=tmp_path).status == -9
    left = {path.name for path in (tmp_path / "runs/r").iterdir()}
    assert {"config.yaml", "run.json"} <= left
    assert "checkpoints" not in left
    again = etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path)
    assert again.status == 0, again.err


def test_two_processes_do_not_train_in_one_folder(etflight_command, tmp_path):
    fit = ["fit", *DIGITS, "--name", "shared"]
    folder = tmp_path / "runs/shared"
    first = start("etflight", *fit, *wait_for(tmp_path / "never"), "--data.num_workers", 1, cwd=tmp_path)
    while not (folder / "checkpoints/last.ckpt").is_file():
        assert first.poll() is None, first.communicate()
        time.sleep(0.05)
    before = contents(tmp_path)
    assert_refused(etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path), "run folder runs/shared is in use")
    assert contents(tmp_path) == before
    first.kill()  # its loader process lives for some seconds more
    first.wait()
    after = etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path)
    assert after.status == 0, after.err
    assert [row["epoch"] for row in rows_of(folder) if row["val/acc"]] == ["0.0", "1.0", "2.0"]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    assert lock(tmp_path) is None


# --- images ------------------------------------------------------------------------------------------------------------

FOLDER = [
    "--data", "FolderImages", "--data.root", "images", "--data.image_size", 8, "--data.batch_size", 4,
    "--data.num_workers", 2, "--model.backbone", "resnet20_cifar", *QUICK, "--name",
]  # fmt: skip


@pytest.fixture
def images(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(6):
                Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-30])


def test_a_truncated_image_is_named_by_every_stage(images, etflight_command, tmp_path):
    trained = etflight_command("fit", *FOLDER, "r", cwd=tmp_path)
    assert trained.status == 0, trained.err
    cut_short(images / "test/cat/5.png")
    cut_short(images / "val/dog/0.png")
    for stage, file, run in (
        ("fit", "val/dog/0.png", ["other"]),
        ("validate", "val/dog/0.png", ["r", "--ckpt_path", "last"]),
        ("test", "test/cat/5.png", ["r", "--ckpt_path", "last"]),
        ("predict", "test/cat/5.png", ["r", "--ckpt_path", "last"]),
    ):
        result = etflight_command(stage, *FOLDER, *run, cwd=tmp_path)
        assert_refused(result, f"images/{file}", "replace it or remove it")
    assert not {"test_metrics.json", "predictions.csv"} & {path.name for path in (tmp_path / "runs/r").iterdir()}


def test_a_truncated_image_is_named_once_by_two_processes(images, tmp_path):
    cut_short(images / "train/dog/3.png")
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    result = ended(start("etflight", "fit", *FOLDER, "r", *two, cwd=tmp_path))
    assert result.status != 0
    result.status = 1  # or that of the launcher's signal
    assert_refused(result, "images/train/dog/3.png", "replace it or remove it")


# --- downloads ---------------------------------------------------------------------------------------------------------


def idx(array):
    return gzip.compress(struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


FILES = {
    f"{part}-{kind}-ubyte.gz": idx(array)
    for part, count in (("train", 40), ("t10k", 20))
    for kind, array in (
        ("images-idx3", np.full((count, 28, 28), count, np.uint8)),
        ("labels-idx1", np.arange(count, dtype=np.uint8) % 10),
    )
}


class Published(datasets.FashionMNIST):
    resources = [(name, hashlib.md5(content).hexdigest()) for name, content in FILES.items()]  # noqa: RUF012


Published.__name__ = "FashionMNIST"  # torchvision's folder is called after the class


class Clothes(FashionMNIST):
    published = Published
    system_folder = "nowhere"


class Mirror(BaseHTTPRequestHandler):
    """A server of files, with a fault that strikes the last file of a set."""

    def do_GET(self):
        name = self.path.lstrip("/")
        content = FILES[name]
        fault = self.server.fault if name.startswith("t10k-labels") else None
        half = len(content) // 2
        if fault == "404":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(half if fault == "truncated" else len(content)))
        self.end_headers()
        if fault == "wrong checksum":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        self.wfile.write(content if fault in (None, "wrong checksum") else content[:half])
        if fault == "falls silent":
            self.server.half_sent.set()
            self.server.released.wait(120)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.fault, server.half_sent, server.released = None, threading.Event(), threading.Event()
    monkeypatch.setattr(Published, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(sets, "PATIENCE", 1.0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def assert_40_training_images(data):
    data.prepare_data()
    data.setup("fit")
    assert len(data.split("train")) == 40


@pytest.mark.parametrize("fault", ["truncated", "wrong checksum", "404", "closes half way", "falls silent"])
def test_a_failed_download_is_one_line_and_the_next_try_works(fault, mirror, tmp_path):
    data = Clothes(root=str(tmp_path / "data"), download=True)
    mirror.fault = fault
    with pytest.raises(UserError, match=r"data: the download failed.*try again, or put the files there yourself"):
        data.prepare_data()
    mirror.fault = None
    assert_40_training_images(data)
    mirror.fault = "404"  # nothing is asked for again
    assert_40_training_images(Clothes(root=str(tmp_path / "data"), download=True))


def test_a_killed_download_does_not_confuse_the_next_one(mirror, monkeypatch, tmp_path):
    data = Clothes(root=str(tmp_path / "data"), download=True)
    monkeypatch.setattr(sets, "PATIENCE", 60.0)
    mirror.fault = "falls silent"
    process = multiprocessing.get_context("fork").Process(target=data.prepare_data)
    process.start()
    assert mirror.half_sent.wait(60)
    process.kill()
    process.join()
    mirror.fault = None
    assert_40_training_images(data)


def test_no_network_is_one_line(mirror, tmp_path):
    mirror.shutdown()
    mirror.server_close()
    with pytest.raises(UserError, match=r"Connection refused.*put the files there yourself"):
        Clothes(root=str(tmp_path / "data"), download=True).prepare_data()
