"""One process, two, three: the same numbers, however the processes were started.

The backbone has no BatchNorm and nothing is augmented, so that all runs of one global batch do the same sums in another order.
"""

import json
import os
import re
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from etflight import Classifier
from etflight.data import Digits
from etflight.utils.errors import UserError
from tests.command_line import CommandLine, finish, start
from tests.left_by_runs import kill
from tests.training import GLOBAL_BATCH, QUIET, VIT, read_csv, small_vit
from tests.training import new_trainer as trainer
from tests.wandb_file import history

ROOT = Path(__file__).parents[2]
EPOCHS = 2
RECIPE = [
    *QUIET, *VIT, "--data.sampler", "balanced", "--data.eval_batch_size", 74, "--model.loss.class_balance", "batch",
    "--model.optimizer.lr", 0.05, "--trainer.callbacks+", "NeuralCollapseMonitor",
]  # fmt: skip


# --- real runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The digits in a file, with 501 test images: an odd number, for two processes and for three."""
    path = tmp_path_factory.mktemp("data") / "digits.npz"
    digits = Digits()
    (train, train_labels), (test, test_labels) = (
        digits.split(name).__getitems__(list(range(len(digits.split(name))))) for name in ("train", "test")
    )
    np.savez(
        path, train_images=train[1:, 0], train_labels=train_labels[1:],
        test_images=torch.cat([test, train[:1]])[:, 0], test_labels=torch.cat([test_labels, train_labels[:1]]),
    )  # fmt: skip
    return ["--data", "ArrayImages", "--data.path", path, "--data.imbalance_ratio", 20, "--data.val_fraction", 0.115]


@pytest.fixture(scope="module")
def fit(data):
    return ["fit", *data, *RECIPE, "--trainer.max_epochs", EPOCHS]


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    return tmp_path_factory.mktemp("cwd")


def shared_by(processes, *, nodes=1):
    return [
        "--trainer.strategy", "ddp", "--trainer.devices", processes // nodes, "--trainer.num_nodes", nodes,
        "--data.batch_size", GLOBAL_BATCH // processes,
    ]  # fmt: skip


def free_port():
    """One of those that a SLURM job's number stands for: 15000 plus its last four digits."""
    for port in np.random.default_rng().integers(15000, 25000, size=100).tolist():
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def torchrun(rank, processes, port):
    return {
        "TORCHELASTIC_RUN_ID": "none", "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def slurm(rank, processes, port):
    return {
        "SLURM_JOB_NAME": "digits", "SLURM_JOB_ID": str(port - 15000), "SLURM_NNODES": "1", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(processes), "SLURM_NTASKS_PER_NODE": str(processes),
        "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
    }  # fmt: skip


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Runs `etflight …` on processes that somebody else has started and numbered: torchrun or srun, by their environment."""
    commands = [CommandLine(tmp_path_factory.mktemp("rank"), RANK=str(rank)) for rank in range(3)]

    def run(*argv, cwd, processes, by=torchrun, **env):
        port = free_port()
        with ThreadPoolExecutor(processes) as threads:
            jobs = [
                threads.submit(command, *argv, cwd=cwd, **by(rank, processes, port), **env)
                for rank, command in enumerate(commands[:processes])
            ]
        for job in jobs:
            job.result().ran()

    yield run
    for command in commands:
        command.close()


@pytest.fixture(scope="module")
def one(etflight_command, fit, cwd):
    result = etflight_command(*fit, "--data.batch_size", GLOBAL_BATCH, "--name", "one", cwd=cwd).ran()
    return cwd / "runs/one", result.out + result.err


@pytest.fixture(scope="module")
def two(fit, cwd):
    """With W&B."""
    wandb = ["-c", ROOT / "configs/logger/wandb.yaml"]
    printed = finish(start("etflight", *fit, *wandb, *shared_by(2), "--name", "two", cwd=cwd, WANDB_MODE="offline"))
    return cwd / "runs/two", printed


def rows(folder):
    return read_csv(folder / "metrics.csv")


def weights(folder):
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]


def assert_same_rows(actual, expected):
    assert len(actual) == len(expected) > 0
    for got, wanted in zip(actual, expected, strict=True):
        assert [name for name in wanted if got[name] == ""] == [name for name in wanted if wanted[name] == ""]
        numbers = ({name: float(value) for name, value in row.items() if value} for row in (got, wanted))
        assert next(numbers) == pytest.approx(next(numbers), rel=1e-4, abs=1e-6, nan_ok=True)


def assert_same_weights(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def assert_same_bits(folder, other):
    assert (folder / "metrics.csv").read_text() == (other / "metrics.csv").read_text()
    expected = weights(other)
    assert not [name for name, value in weights(folder).items() if not torch.equal(value, expected[name])]


def test_two_processes_log_and_learn_what_one_does_and_describe_the_step_once(one, two):
    """Of the last batch's 17 images one process has 9 and the other 8; of 149 validation images one has two batches and the other one."""
    columns = set(rows(one[0])[-1])
    assert columns >= {"train/loss", "nc/train/nc1", "nc/train/alignment", "nc/val/nc1", "nc/val/nc4"}
    assert columns >= {f"val/{name}" for name in ("loss", "acc", "acc_macro", "acc_many", "acc_few", "acc_tail", "ece")}
    assert columns >= {f"val/{name}" for name in ("acc_medium", "acc_worst", "acc_harmonic", "ece_calibrated")}
    assert_same_rows(rows(two[0]), rows(one[0]))
    assert_same_weights(weights(two[0]), weights(one[0]))
    assert float(weights(one[0])["temperature"]) != 1  # fitted, on both
    for (_, printed), batch in ((one, "1 process x 60 images"), (two, "2 processes x 30 images")):
        assert printed.count(f"global batch 60 = {batch}") == 1


def test_two_processes_are_one_wandb_run(two):
    (file,) = two[0].rglob("*.wandb")
    assert [row for row in history(file) if "train/loss" in row]
    assert json.loads((two[0] / "run.json").read_text())["hardware"]["processes"] == 2


def test_two_nodes_do_what_two_processes_of_one_do(two, fit, cwd):
    rendezvous = ["--nnodes", 2, "--nproc-per-node", 1, "--master-addr", "127.0.0.1", "--master-port", free_port()]
    command = ["-m", "etflight", *fit, *shared_by(2, nodes=2), "--name", "two_nodes"]
    agent = ["torch.distributed.run", *rendezvous]
    finish(*[start(*agent, "--node-rank", node, *command, cwd=cwd) for node in (0, 1)])
    assert_same_bits(cwd / "runs/two_nodes", two[0])


def test_a_slurm_job_out_of_time_requeues_itself_and_ends_as_if_it_had_had_more(two, fit, numbered, cwd):
    scontrol = cwd / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {cwd}/requeued\n')
    scontrol.chmod(0o755)
    array = {"SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "1", "PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    overlay = ["-c", ROOT / "configs/trainer/ddp_cpu.yaml", "--data.batch_size", GLOBAL_BATCH // 2]
    argv = [*fit, *overlay, "--name", "requeued", "--ckpt_path", "last"]
    out_of_time = kill(9, rank=1, signal=signal.SIGUSR1.value)
    numbered(*argv, *out_of_time, cwd=cwd, processes=2, by=slurm, **array)
    assert (cwd / "requeued").read_text() == "requeue 70_1\n"
    folder = cwd / "runs/requeued"
    assert torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["global_step"] in (10, 11, 12)
    numbered(*argv, cwd=cwd, processes=2, by=slurm, **array)
    assert_same_bits(folder, two[0])


def test_the_readmes_job_script_gives_each_task_its_seed_and_its_run(etflight_command, tmp_path):
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "docs/how_to/many_gpus.md").read_text(), re.DOTALL)
    script = next(block for block in blocks if "#SBATCH" in block)
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    srun.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "2"}
    command = subprocess.check_output(["bash", "-euc", script], env=environment, text=True).splitlines()
    assert command[0] == "etflight"
    result = etflight_command(*command[1:], "--print_config", cwd=ROOT).ran()
    config = yaml.safe_load(result.out)
    assert config["seed_everything"] == 2
    assert config["name"].endswith("_2")
    assert config["trainer"]["strategy"] == "ddp"
    asked = {name: int(number) for name, number in re.findall(r"#SBATCH --([\w-]+)=(\d+)\n", script)}
    assert asked["nodes"] == config["trainer"]["num_nodes"]
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]  # one process per GPU


def test_a_checkpoint_of_two_processes_tests_and_predicts_the_same_on_one_and_on_three(
    two, etflight_command, numbered, data, cwd
):
    for stage in ("test", "predict"):
        argv = [stage, *data, *QUIET, "--ckpt_path", two[0] / "checkpoints/last.ckpt"]
        etflight_command(*argv, "--name", "on_1", cwd=cwd).ran()
        numbered(*argv, "--name", "on_3", *shared_by(3), cwd=cwd, processes=3)
    of_one, of_three = cwd / "runs/on_1", cwd / "runs/on_3"
    one, three = (json.loads((folder / "test_metrics.json").read_text()) for folder in (of_one, of_three))
    assert {"test/acc", "test/acc_few", "test/ece", "test/ece_calibrated", "test/loss"} <= one.keys()
    assert three == pytest.approx(one, rel=1e-5)
    for name in ("per_class.csv", "predictions.csv"):
        assert (of_three / name).read_text() == (of_one / name).read_text()
    assert (of_one / "predictions.csv").read_text().count("\n") == 1 + 501


def test_training_of_two_processes_goes_on_with_another_number(one, etflight_command, numbered, fit, cwd):
    numbered(*fit, *shared_by(2), "--trainer.max_epochs", EPOCHS - 1, "--name", "halfway", cwd=cwd, processes=2)
    argv = [*fit, "--ckpt_path", cwd / "runs/halfway/checkpoints/last.ckpt"]
    etflight_command(*argv, *shared_by(1), "--name", "on_with_1", cwd=cwd).ran()
    numbered(*argv, *shared_by(3), "--name", "on_with_3", cwd=cwd, processes=3)
    expected = [row for row in rows(one[0]) if row["epoch"] == f"{EPOCHS - 1:.1f}"]
    for folder in (cwd / "runs/on_with_1", cwd / "runs/on_with_3"):
        assert_same_rows(rows(folder), expected)
        assert_same_weights(weights(folder), weights(one[0]))


# --- in processes that are there already -------------------------------------------------------------------------------


TWO = {"devices": 2, "strategy": "ddp", "limit_val_batches": 0}


class BadOnTheSecondProcess(Classifier):
    """Its loss is not a number in one step of one process."""

    def forward(self, images):
        logits = super().forward(images)
        return logits * torch.nan if self.global_rank == 1 and self.global_step == 3 else logits


def train_a_frame_of_its_own(rank):
    classifier = small_vit(seed=rank)
    before = classifier.head.weight.clone()
    trainer(**TWO, max_steps=1).fit(classifier, datamodule=Digits(batch_size=GLOBAL_BATCH))
    return before, classifier.head.weight


def test_processes_that_computed_different_frames_train_on_the_first_ones(two_ready_processes):
    (first, trained), (second, other) = two_ready_processes(train_a_frame_of_its_own, [()] * 2)
    assert not torch.equal(first, second)
    assert torch.equal(trained, first)
    assert torch.equal(other, first)


def train_until_refused(rank):
    with pytest.raises(UserError) as refusal:
        trainer(**TWO, max_steps=5).fit(small_vit(BadOnTheSecondProcess), Digits(batch_size=30))
    return str(refusal.value)


def test_a_loss_that_is_not_a_number_on_one_process_stops_all_and_names_its_step(two_ready_processes):
    for message in two_ready_processes(train_until_refused, [()] * 2):
        assert "NaN or infinite at step 3 " in message
