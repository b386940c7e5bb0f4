"""Faults of the world around a run: training goes on where it can; where it cannot, one line says what, where and the mend."""

import gzip
import hashlib
import json
import multiprocessing
import os
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torchvision import datasets

from etflight.data import FashionMNIST, sets
from etflight.utils.errors import UserError
from tests.command_line import ended, start
from tests.data.test_sets import idx
from tests.left_by_runs import contents, kill
from tests.training import QUICK, QUIET, fit_digits, image_folder, read_csv
from tests.waiting import DEADLINE, wait_until
from tests.wandb_file import history

ROOT = Path(__file__).parents[2]
EPOCHS = 3
DIGITS = [
    "--data", "Digits", "--data.max_count", 10, "--model.backbone", "resnet20_cifar", *QUIET,
    "--trainer.max_epochs", EPOCHS,
]  # fmt: skip


def warnings_in(result):
    return [line for line in result.err.splitlines() if line.startswith("etflight: warning:")]


# --- loggers -----------------------------------------------------------------------------------------------------------


def test_training_goes_on_without_a_logger_whose_server_is_gone(etflight_command, tmp_path):
    logger = ["--trainer.logger+", "tests.runs.test_loggers.Fragile"]
    result = etflight_command("fit", *DIGITS, *logger, "--name", "r", cwd=tmp_path).ran()
    (warning,) = warnings_in(result)
    assert "Fragile fell silent (no route)" in warning
    rows = read_csv(tmp_path / "runs/r/metrics.csv")
    assert [row["epoch"] for row in rows if row["val/acc"]] == ["0.0", "1.0", "2.0"]


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


class Silent(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass


@contextmanager
def serving(handler):
    """A server with two events for its handler, and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.fault, server.reached, server.released = None, threading.Event(), threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, f"http://127.0.0.1:{server.server_port}"
    server.released.set()
    server.shutdown()
    server.server_close()


class WandbServer(Silent):
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
            self.server.reached.set()


def assert_all_is_to_be_synced(warning, cwd):
    """The folder that the warning says to upload holds the run, with every epoch."""
    folder = cwd / warning.rpartition("wandb sync ")[2]
    assert folder.is_relative_to(cwd / "runs/w"), warning
    (file,) = folder.glob("*.wandb")
    written = [float(row["train/loss"]) for row in read_csv(cwd / "runs/w" / "metrics.csv") if row["train/loss"]]
    assert len(written) == EPOCHS

    def kept():
        return [row["train/loss"] for row in history(file) if "train/loss" in row]

    wait_until(lambda: len(kept()) == EPOCHS)  # W&B's own process may still be writing
    assert kept() == pytest.approx(written)


def test_wandb_goes_on_offline_where_its_server_does_not_answer(etflight_command, tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, WANDB_BASE_URL=address, **ACCOUNT).ran()
    (warning,) = warnings_in(result)
    assert_all_is_to_be_synced(warning, tmp_path)


def test_wandb_keeps_what_a_server_that_went_away_has_not_taken(tmp_path):
    patience = {"WANDB_INIT_TIMEOUT": "300", "WANDB_FINISH_TIMEOUT": "4", "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "1"}
    fit = ["etflight", "fit", *WANDB, *wait_for(tmp_path / "gone"), "--name", "w"]
    with serving(WandbServer) as (server, address):
        process = start(*fit, cwd=tmp_path, WANDB_BASE_URL=address, **ACCOUNT | patience)
        wait_until(server.reached.is_set, process=process)
    (tmp_path / "gone").touch()
    result = ended(process).ran()
    (warning,) = warnings_in(result)
    assert "has not received everything" in warning
    assert_all_is_to_be_synced(warning, tmp_path)


def test_wandb_without_an_account_is_refused_before_training(etflight_command, tmp_path):
    home = {"HOME": str(tmp_path / "home"), "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none")}
    result = etflight_command("fit", *WANDB, "--name", "w", cwd=tmp_path, **home)
    result.assert_refused("wandb login", "WANDB_MODE=offline")
    assert not (tmp_path / "runs/w/metrics.csv").exists()


# --- a run folder that is not ours -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(etflight_command, tmp_path_factory):
    cwd = tmp_path_factory.mktemp("trained")
    etflight_command("fit", *DIGITS, "--name", "r", cwd=cwd).ran()
    return cwd / "runs/r/checkpoints/last.ckpt"


@pytest.mark.parametrize(("stage", "root"), [("fit", "notes.txt/runs"), ("test", "notes.txt"), ("predict", "/proc")])
def test_a_run_folder_that_cannot_be_made_is_refused_before_work(stage, root, checkpoint, etflight_command, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    trained = [] if stage == "fit" else ["--ckpt_path", checkpoint]
    argv = [stage, *DIGITS, *trained, "--trainer.default_root_dir", root, "--name", "r"]
    option = "--output" if stage == "predict" else "--trainer.default_root_dir"
    etflight_command(*argv, cwd=tmp_path).assert_refused(f"folder {root}/r cannot be written to", option)
    assert contents(tmp_path) == {Path("notes.txt"): b"mine"}


def test_a_folder_without_permission_is_refused(tmp_path, monkeypatch):
    folder, access = tmp_path / "theirs", os.access
    folder.mkdir()
    # the superuser may write anywhere, so that the kernel's answer to anybody else stands in here
    monkeypatch.setattr(os, "access", lambda path, *mode, **how: path != folder and access(path, *mode, **how))
    with pytest.raises(UserError, match="theirs/r cannot be written to"):
        fit_digits(folder)
    assert not list(folder.iterdir())


def test_a_folder_of_another_program_is_refused_and_stays_as_it_is(etflight_command, tmp_path):
    project = tmp_path / "runs/project"
    project.mkdir(parents=True)
    for theirs in ("metrics.csv", "config.yaml"):
        (project / theirs).write_text("years of work")
        result = etflight_command("fit", *DIGITS, "--name", "project", cwd=tmp_path)
        result.assert_refused("runs/project", theirs, "--name")
    assert set(contents(tmp_path).values()) == {b"years of work"}


def test_a_run_killed_before_its_first_checkpoint_may_start_again(etflight_command, tmp_path):
    assert etflight_command("fit", *DIGITS, *kill(0), "--name", "r", cwd=tmp_path).status == -9
    left = {path.name for path in (tmp_path / "runs/r").iterdir()}
    assert {"config.yaml", "run.json"} <= left
    assert "checkpoints" not in left
    etflight_command("fit", *DIGITS, "--name", "r", cwd=tmp_path).ran()


def test_the_curves_of_a_training_whose_checkpoint_has_gone_stay_as_they_are(etflight_command, tmp_path):
    fit = ["fit", *DIGITS, "--trainer.enable_checkpointing", "false", "--trainer.max_epochs", 2, "--name", "r"]
    etflight_command(*fit, cwd=tmp_path).ran()
    before = contents(tmp_path)
    etflight_command(*fit, cwd=tmp_path).assert_refused("runs/r")
    assert contents(tmp_path) == before


def test_two_processes_do_not_train_in_one_folder(etflight_command, tmp_path):
    fit = ["fit", *DIGITS, "--name", "shared"]
    folder = tmp_path / "runs/shared"
    first = start("etflight", *fit, *wait_for(tmp_path / "never"), "--data.num_workers", 1, cwd=tmp_path)
    wait_until((folder / "checkpoints/last.ckpt").is_file, process=first)
    before = contents(tmp_path)
    etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path).assert_refused("runs/shared is in use")
    assert contents(tmp_path) == before
    first.kill()  # its loader process lives for some seconds more
    first.wait()
    etflight_command(*fit, "--ckpt_path", "last", cwd=tmp_path).ran()
    assert [row["epoch"] for row in read_csv(folder / "metrics.csv") if row["val/acc"]] == ["0.0", "1.0", "2.0"]


def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", lambda *_: os.open(tmp_path, os.O_WRONLY))  # an OSError of another kind
    run = fit_digits(tmp_path, "--trainer.max_epochs", 1, "--trainer.limit_train_batches", 1)
    assert (run / "checkpoints/last.ckpt").exists()


# --- images ------------------------------------------------------------------------------------------------------------


def test_a_truncated_image_is_named_once_by_two_processes(tmp_path):
    data = image_folder(tmp_path / "images", {"cat": 6, "dog": 6})
    file = tmp_path / "images/train/dog/3.png"
    file.write_bytes(file.read_bytes()[:-30])
    options = ["--data.batch_size", 4, "--data.num_workers", 2, "--model.backbone", "resnet20_cifar", *QUICK]
    two = ["--trainer.strategy", "ddp", "--trainer.devices", 2]
    result = ended(start("etflight", "fit", *data, *options, *two, "--name", "r", cwd=tmp_path))
    assert result.status != 0
    result.status = 1  # or that of the launcher's signal
    result.assert_refused("images/train/dog/3.png")


# --- downloads ---------------------------------------------------------------------------------------------------------


FILES = {
    f"{part}-{kind}-ubyte.gz": gzip.compress(idx(array))
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


class Mirror(Silent):
    """A server of files, with a fault that strikes the last file of a set."""

    def do_GET(self):
        name = self.path.lstrip("/")
        content = FILES[name]
        fault = self.server.fault if name.startswith("t10k-labels") else None
        half = len(content) // 2
        if fault == "hangs up":
            return
        if fault == "404":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "wrong checksum":
            content = content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        self.wfile.write(content if fault in (None, "wrong checksum") else content[:half])
        if fault == "falls silent":
            self.server.reached.set()
            self.server.released.wait(DEADLINE)


@pytest.fixture
def mirror(monkeypatch):
    with serving(Mirror) as (server, address):
        monkeypatch.setattr(Published, "mirrors", [f"{address}/"])
        yield server


def assert_40_training_images(data):
    data.prepare_data()
    data.setup("fit")
    assert len(data.split("train")) == 40


@pytest.mark.parametrize("fault", ["wrong checksum", "404", "closes half way", "falls silent", "hangs up"])
def test_a_failed_download_is_one_line_and_the_next_try_works(fault, mirror, monkeypatch, tmp_path):
    data = Clothes(root=str(tmp_path / "data"), download=True)
    mirror.fault = fault
    with monkeypatch.context() as hurried:
        hurried.setattr(sets, "PATIENCE", 1.0 if fault == "falls silent" else sets.PATIENCE)
        with pytest.raises(UserError, match="data: the download failed"):
            data.prepare_data()
    mirror.fault = None
    assert_40_training_images(data)
    mirror.fault = "404"  # nothing is asked for again
    assert_40_training_images(Clothes(root=str(tmp_path / "data"), download=True))


def test_a_killed_download_does_not_confuse_the_next_one(mirror, tmp_path):
    data = Clothes(root=str(tmp_path / "data"), download=True)
    mirror.fault = "falls silent"
    process = multiprocessing.get_context("fork").Process(target=data.prepare_data)
    process.start()
    wait_until(mirror.reached.is_set)
    process.kill()
    process.join()
    mirror.fault = None
    assert_40_training_images(data)
