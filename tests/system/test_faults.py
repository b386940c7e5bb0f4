"""Faults of the world around a run: training goes on where it can; where it cannot, one line says what, where and the mend."""

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
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

from etflight.runs.folder import check_writable, lock
from etflight.utils.errors import UserError
from tests.cli.test_stages import QUICK
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
OWN_LOGGER = [*DIGITS, *PICTURES, "--trainer.logger+", "tests.system.test_faults.Telegraph", "--trainer.logger.port"]


def warnings_in(result):
    return [line for line in result.err.splitlines() if line.startswith("etflight: warning:")]


def rows_of(folder):
    return list(csv.DictReader((folder / "metrics.csv").open()))


@pytest.fixture
def started():
    """Starts `etflight …` as a process of its own, with the exit functions that a forked one does not run."""
    processes = []

    def start(*argv, cwd, **env):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "etflight", *map(str, argv)],
                cwd=cwd, env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | env, text=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.communicate()


# --- a logger whose server is gone -------------------------------------------------------------------------------------


class Telegraph(Logger):
    """Sends a line per call to a server, and waits for its answer.

    Args:
        port: of the server, on this machine.
    """

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port
        self._connection = None

    name = version = property(lambda self: "telegraph")

    @property
    def experiment(self):
        """A connection to the server."""
        if rank_zero_only.rank == 0 and self._connection is None:
            self._connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        return self._connection

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
        self.experiment.sendall(json.dumps(content).encode() + b"\n")
        if self.experiment.recv(1) != b"+":
            raise ConnectionResetError("the server is gone")


@pytest.fixture
def telegraph_office():
    """A server on this machine that takes so many lines and closes: its port, and the lines."""
    listeners = []

    def serve(lines):
        taken, listener = [], socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)

        def take():
            connection, _ = listener.accept()
            with connection, connection.makefile("rb") as stream:
                while len(taken) < lines and (line := stream.readline()):
                    taken.append(json.loads(line))
                    connection.sendall(b"+")
                listener.close()

        threading.Thread(target=take, daemon=True).start()
        return listener.getsockname()[1], taken

    yield serve
    for listener in listeners:
        listener.close()


def test_a_logger_whose_server_lives_gets_everything(telegraph_office, etflight_command, tmp_path):
    port, taken = telegraph_office(10**6)
    result = etflight_command("fit", *OWN_LOGGER, port, "--name", "live", cwd=tmp_path)
    assert result.status == 0, result.err
    assert warnings_in(result) == []
    rows = rows_of(tmp_path / "runs/live")
    # clock times go to loggers, not into metrics.csv
    sent = [line for line in taken if not {"image", "status", "speed/images_per_s"} & line.keys()]
    assert [line["step"] for line in sent] == [int(row["step"]) for row in rows]
    assert {line["image"] for line in taken if "image" in line} >= {"nc/curves", "nc/heat_map"}
    assert taken[-1] == {"status": "success"}


# rows are the monitor's before training, those of epoch 0, its pictures, …
@pytest.mark.parametrize("lines", [0, 1, 4])
def test_training_goes_on_without_a_logger_whose_server_is_gone(lines, telegraph_office, etflight_command, tmp_path):
    quiet = etflight_command("fit", *DIGITS, *PICTURES, "--name", "alone", cwd=tmp_path)
    assert quiet.status == 0, quiet.err
    port, taken = telegraph_office(lines)
    result = etflight_command("fit", *OWN_LOGGER, port, "--name", "cut", cwd=tmp_path)
    assert result.status == 0, result.err
    assert len(taken) == lines
    (warning,) = warnings_in(result)
    assert "Telegraph fell silent" in warning
    assert "runs/cut/metrics.csv" in warning
    assert (tmp_path / "runs/cut/metrics.csv").read_text() == (tmp_path / "runs/alone/metrics.csv").read_text()
    assert len(rows_of(tmp_path / "runs/cut")) > EPOCHS
    assert (tmp_path / "runs/cut/figures/nc_curves.png").is_file()
    assert (tmp_path / "runs/cut/checkpoints/last.ckpt").is_file()


def test_training_goes_on_where_there_never_was_a_server(etflight_command, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    result = etflight_command("fit", *OWN_LOGGER, port, "--name", "none", cwd=tmp_path)
    assert result.status == 0, result.err
    (warning,) = warnings_in(result)
    assert "Telegraph fell silent (ConnectionRefusedError" in warning
    assert len(rows_of(tmp_path / "runs/none")) > EPOCHS


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


def synced_folder(line, cwd):
    """The folder that the warning says to upload, which must hold the run."""
    folder = cwd / line.rpartition("wandb sync ")[2]
    assert folder.is_dir(), line
    (file,) = folder.glob("*.wandb")
    return file


@pytest.mark.parametrize("server", ["refuses", "does not answer"])
def test_wandb_goes_on_offline_where_its_server_cannot_be_reached(server, etflight_command, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        port = listener.getsockname()[1]
        if server == "refuses":
            listener.close()
        address = f"http://127.0.0.1:{port}"
        result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, WANDB_BASE_URL=address, **ACCOUNT)
    assert result.status == 0, result.err
    (warning,) = warnings_in(result)
    file = synced_folder(warning, tmp_path)
    assert file.is_relative_to(tmp_path / "runs/w")
    rows = rows_of(tmp_path / "runs/w")
    written = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert [row["train/loss"] for row in history(file) if "train/loss" in row] == pytest.approx(written)
    assert len(written) == EPOCHS


def test_wandb_keeps_what_a_server_that_went_away_has_not_taken(started, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), WandbServer)
    server.seen_rows = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()

    wait = ["--trainer.callbacks+", "tests.system.test_faults.WaitFor", "--trainer.callbacks.path", tmp_path / "gone"]
    process = started(
        "fit", *WANDB, *wait, "--name", "w", cwd=tmp_path,
        **ACCOUNT | {"WANDB_INIT_TIMEOUT": "30", "WANDB_FINISH_TIMEOUT": "15", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1"},
        WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}",
    )  # fmt: skip
    assert server.seen_rows.wait(120)
    server.shutdown()
    server.server_close()
    (tmp_path / "gone").touch()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    (warning,) = [line for line in err.splitlines() if line.startswith("etflight: warning:")]
    assert "has not taken everything" in warning
    file = synced_folder(warning, tmp_path)
    written = [float(row["train/loss"]) for row in rows_of(tmp_path / "runs/w") if row["train/loss"]]
    assert [row["train/loss"] for row in history(file) if "train/loss" in row] == pytest.approx(written)
    assert len(written) == EPOCHS


def test_wandb_without_an_account_is_refused_before_training(etflight_command, tmp_path):
    home = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, **home)
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert "wandb login" in line
    assert "WANDB_MODE=offline" in line
    assert not (tmp_path / "runs/w/metrics.csv").exists()


# --- a run folder that is not ours -------------------------------------------------------------------------------------


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


NOWHERE = {"below a file": "notes.txt/runs", "a file": "notes.txt", "in the kernel's folder": "/proc/runs"}


@pytest.mark.parametrize("where", NOWHERE)
def test_a_run_folder_that_cannot_be_made_is_refused_before_training(where, etflight_command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = etflight_command("fit", *DIGITS, "--trainer.default_root_dir", NOWHERE[where], "--name", "r", cwd=tmp_path)
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert f"folder {NOWHERE[where]}/r cannot be written to" in line
    assert "--trainer.default_root_dir" in line
    assert "Trainer.fit" not in result.err
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
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert f"runs/project has a {theirs}" in line
    assert "--name" in line
    assert contents(tmp_path) == {Path(f"runs/project/{theirs}"): b"years of work"}


def test_a_run_killed_before_its_first_checkpoint_may_start_again(etflight_command, tmp_path):
    kill = ["--trainer.callbacks+", "tests.left_by_runs.Kill", "--trainer.callbacks.after", 0]
    assert etflight_command("fit", *DIGITS, *kill, "--name", "r", cwd=tmp_path).status == -9
    left = {path.name for path in (tmp_path / "runs/r").iterdir()}
    assert {"config.yaml", "run.json"} <= left
    assert "checkpoints" not in left
    again = etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path)
    assert again.status == 0, again.err


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_results_that_cannot_be_written_are_one_line(stage, etflight_command, tmp_path):
    assert etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path).status == 0
    (tmp_path / "file").touch()
    argv = [stage, *DIGITS, "--ckpt_path", "runs/r/checkpoints/last.ckpt", "--name", "r"]
    for root in ("file", "/proc"):
        result = etflight_command(*argv, "--trainer.default_root_dir", root, cwd=tmp_path)
        assert result.status == 1, result.err
        (line,) = result.error_lines
        assert f"folder {root}/r cannot be written to" in line


def test_two_processes_do_not_train_in_one_folder(started, etflight_command, tmp_path):
    wait = ["--trainer.callbacks+", "tests.system.test_faults.WaitFor", "--trainer.callbacks.path", tmp_path / "never"]
    fit = ["fit", *DIGITS, "--name", "shared"]
    first = started(*fit, *wait, "--data.num_workers", 1, cwd=tmp_path)
    until((tmp_path / "runs/shared/checkpoints/last.ckpt").is_file, first)
    before = contents(tmp_path)
    second = etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path)
    assert second.status == 1, second.err
    (line,) = second.error_lines
    assert "run folder runs/shared is in use" in line
    assert contents(tmp_path) == before
    first.kill()  # its loader process lives for some seconds more
    first.wait()
    after = etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path)
    assert after.status == 0, after.err
    assert [row["epoch"] for row in rows_of(tmp_path / "runs/shared") if row["val/acc"]] == ["0.0", "1.0", "2.0"]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", unsupported)
    assert lock(tmp_path) is None


def until(holds, process):
    while not holds():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


# --- images ------------------------------------------------------------------------------------------------------------

FOLDER = [
    "--data", "FolderImages", "--data.root", "images", "--data.image_size", 8, "--data.batch_size", 4,
    "--model.backbone", "resnet20_cifar", *QUICK,
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


def assert_names(file, status, err):
    assert status == 1, err
    (line,) = [line for line in err.splitlines() if line.startswith("etflight: error:")]
    assert file in line
    assert "replace it or remove it" in line
    assert "Traceback" not in err


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_truncated_image_is_named_when_training(split, workers, images, etflight_command, tmp_path):
    cut_short(images / split / "dog/3.png")
    result = etflight_command("fit", *FOLDER, "--data.num_workers", workers, "--name", "r", cwd=tmp_path)
    assert_names(f"images/{split}/dog/3.png", result.status, result.err)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_or_truncated_image_is_named_by_every_other_stage(workers, images, etflight_command, tmp_path):
    trained = etflight_command("fit", *FOLDER, "--name", "r", cwd=tmp_path)
    assert trained.status == 0, trained.err
    cut_short(images / "test/cat/5.png")
    cut_short(images / "val/dog/0.png")
    for stage, file in (("validate", "val/dog/0.png"), ("test", "test/cat/5.png"), ("predict", "test/cat/5.png")):
        argv = [stage, *FOLDER, "--data.num_workers", workers, "--ckpt_path", "last", "--name", "r"]
        result = etflight_command(*argv, cwd=tmp_path)
        assert_names(f"images/{file}", result.status, result.err)
    assert not {"test_metrics.json", "predictions.csv"} & {path.name for path in (tmp_path / "runs/r").iterdir()}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_once_by_two_processes(workers, images, started, tmp_path):
    cut_short(images / "train/dog/3.png")
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2, "--data.num_workers", workers]
    process = started("fit", *FOLDER, *two, "--name", "r", cwd=tmp_path)
    _, err = process.communicate(timeout=240)
    assert process.returncode != 0, err
    assert_names("images/train/dog/3.png", 1, err)


# --- downloads ---------------------------------------------------------------------------------------------------------


def idx(array):
    return struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def clothes():
    files = {}
    for part, count in (("train", 40), ("t10k", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 28, 28), np.uint8)
        files[f"{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(pixels), mtime=0)
        files[f"{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx((np.arange(count) % 10).astype(np.uint8)), mtime=0)
    return files


def cifar():
    batches = {"batches.meta": {"label_names": list("abcdefghij")}}
    for name, count in (("data_batch_1", 40), ("test_batch", 20)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), np.uint8)
        batches[name] = {"data": pixels, "labels": [i % 10 for i in range(count)]}
    batches = {name: pickle.dumps(content) for name, content in batches.items()}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return batches, {"cifar-10-python.tar.gz": archive.getvalue()}


def md5(content):
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


MODULE = """
from torchvision import datasets
from etflight.data import CIFAR10, FashionMNIST, sets

sets.PATIENCE = 1.0

class PublishedCIFAR10(datasets.CIFAR10):
    url = "{address}/cifar-10-python.tar.gz"
    tgz_md5 = {archive!r}
    train_list = [["data_batch_1", {data_batch_1!r}]]
    test_list = [["test_batch", {test_batch!r}]]
    meta = {{"filename": "batches.meta", "key": "label_names", "md5": {meta!r}}}

class PublishedFashionMNIST(datasets.FashionMNIST):
    mirrors = ["{address}/"]
    resources = {resources!r}

PublishedFashionMNIST.__name__ = "FashionMNIST"  # torchvision's folder is called after the class

class Pictures(CIFAR10):
    published = PublishedCIFAR10

class Clothes(FashionMNIST):
    published = PublishedFashionMNIST
    system_folder = "nowhere"
"""


class Mirror(BaseHTTPRequestHandler):
    """A server of files, with a fault that strikes the last file of a set."""

    def do_GET(self):
        name = self.path.lstrip("/")
        content = self.server.files[name]
        fault = self.server.fault if name.startswith(("cifar", "t10k-labels")) else None
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
        if fault in ("falls silent", "is killed"):
            self.server.half_sent.set()
            self.server.released.wait(120)

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.fault, server.half_sent, server.released = None, threading.Event(), threading.Event()
    batches, archive = cifar()
    server.files = archive | clothes()
    module = MODULE.format(
        address=f"http://127.0.0.1:{server.server_port}",
        archive=md5(archive["cifar-10-python.tar.gz"]),
        **{name.rpartition(".")[2]: md5(content) for name, content in batches.items()},
        resources=[(name, md5(content)) for name, content in clothes().items()],
    )
    (tmp_path / "my_sets.py").write_text(module)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def download(name, *more):
    data = ["--data", f"my_sets.{name}", "--data.root", "data", "--data.download", "true", *more]
    return ["fit", *data, "--model.backbone", "resnet20_cifar", *QUICK]


@pytest.mark.parametrize("fault", ["truncated", "wrong checksum", "404", "closes half way", "falls silent"])
@pytest.mark.parametrize("name", ["Pictures", "Clothes"])
def test_a_failed_download_is_one_line_and_the_next_try_works(name, fault, mirror, etflight_command, tmp_path):
    mirror.fault = fault
    result = etflight_command(*download(name), "--name", "first", cwd=tmp_path)
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert f"{name} in data: the download failed" in line
    assert "try again, or put the files there yourself" in line
    mirror.fault = None
    again = etflight_command(*download(name), "--name", "second", cwd=tmp_path)
    assert again.status == 0, again.err
    assert "40 training images" in again.err
    mirror.files = {}
    offline = etflight_command(*download(name), "--name", "third", cwd=tmp_path)
    assert offline.status == 0, offline.err


@pytest.mark.parametrize("name", ["Pictures", "Clothes"])
def test_a_killed_download_does_not_confuse_the_next_one(name, mirror, started, etflight_command, tmp_path):
    mirror.fault = "is killed"
    process = started(*download(name), "--name", "first", cwd=tmp_path)
    assert mirror.half_sent.wait(120)
    process.kill()
    process.wait()
    mirror.fault = None
    again = etflight_command(*download(name), "--name", "second", cwd=tmp_path)
    assert again.status == 0, again.err
    assert "40 training images" in again.err


@pytest.mark.parametrize("name", ["Pictures", "Clothes"])
def test_no_network_is_one_line(name, mirror, etflight_command, tmp_path):
    mirror.shutdown()
    mirror.server_close()
    result = etflight_command(*download(name), cwd=tmp_path)
    assert result.status == 1, result.err
    (line,) = result.error_lines
    assert "Connection refused" in line
    assert "put the files there yourself" in line
