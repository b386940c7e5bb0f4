"""What somebody sees who watches a training: the bar, a line for each epoch, the speed, what a step is made of."""

import re
import sys

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from etflight import Classifier, CrossEntropyLoss, DotRegressionLoss
from etflight.callbacks import LastCheckpoint, Speed, progress
from etflight.callbacks.progress import Progress, describe_step, is_watched
from etflight.cli.stages import main
from etflight.data import Digits, loaders
from etflight.runs.loggers import MetricsCSV
from tests.left_by_runs import Interrupt, InterruptError, differences, read
from tests.training import new_trainer, read_csv

FIT = [
    "fit", "--data", "Digits", "--data.max_count", "10", "--data.batch_size", "20", "--model.backbone", "resnet20_cifar",
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.log_every_n_steps", "2",
    "--trainer.enable_model_summary", "false", "--trainer.callbacks+", "NeuralCollapseMonitor", "--name", "r",
]  # fmt: skip


@pytest.fixture(scope="module")
def terminal(etflight_command, tmp_path_factory):
    """What a terminal shows, and what is logged."""
    cwd = tmp_path_factory.mktemp("terminal")
    sent = etflight_command.in_terminal(*FIT, cwd=cwd, CI="")
    rows = read_csv(cwd / "runs/r/metrics.csv")
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent), rows


def epoch_lines(text):
    return re.findall(r"epoch [^\r\n]+", text)


def test_the_bar_shows_loss_accuracy_alignment_speed_and_the_time_left(terminal):
    for shown in ("loss", "val/acc", "alignment", "images/s", "left"):
        assert re.search(rf"{shown}: -?\d[\d.:]*", terminal[0]), shown


def test_each_epoch_is_told_in_one_line_of_logged_numbers(terminal):
    text, rows = terminal
    told = epoch_lines(text)
    logged = {name: [float(row[name]) for row in rows if row.get(name)] for name in rows[0]}
    assert len(told) == 2
    for epoch, line in enumerate(told):
        found = re.fullmatch(
            r"epoch (\d)/2: loss (\S+), val accuracy (\S+) %, alignment (\S+), \d+ images/s, (\d:\d\d:\d\d) left *",
            line,
        )
        assert found, line
        number, loss, accuracy, alignment, left = found.groups()
        assert int(number) == epoch + 1
        assert float(loss) == pytest.approx(logged["train/loss"][epoch], rel=6e-3)
        assert float(accuracy) == pytest.approx(100 * logged["val/acc"][epoch], abs=0.051)
        assert float(alignment) == pytest.approx(logged["nc/train/alignment"][epoch + 1], abs=6e-4)
    assert left == "0:00:00"


@pytest.mark.parametrize(
    ("is_terminal", "env", "watched"),
    [(True, {}, True), (True, {"CI": "true"}, False), (True, {"SLURM_JOB_ID": "7"}, False), (False, {}, False)],
)
def test_ci_batch_systems_and_files_are_not_watched(is_terminal, env, watched, monkeypatch):
    for name in ("CI", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal)
    assert is_watched() == watched


@pytest.mark.parametrize(("asked", "bar"), [([], False), (["--trainer.enable_progress_bar", "true"], True)])
def test_a_file_gets_the_lines_without_the_bar_unless_it_is_asked_for(asked, bar, tmp_path, capfd):
    root = ["--trainer.default_root_dir", str(tmp_path), "--trainer.profiler", "simple"]
    main([*FIT, *root, "--trainer.max_epochs", "1", *asked])
    printed = capfd.readouterr().out
    assert len(epoch_lines(printed)) == 1
    assert ("images/s: " in printed) == bar
    assert "run_training_batch" in (tmp_path / "r/fit-profile.txt").read_text()


# --- speed -------------------------------------------------------------------------------------------------------------


class Clock:
    """Stands still but where a test lets time pass."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(loaders, "time", clock)
    return clock


class Slow(Digits):
    """Its batches take time."""

    def __init__(self, clock, seconds):
        super().__init__(batch_size=16, views=2)
        self.clock, self.seconds = clock, seconds

    def train_dataloader(self):
        loader = super().train_dataloader()
        fetch, clock, seconds = loader.dataset.__getitems__, self.clock, self.seconds

        class SlowSplit(type(loader.dataset)):
            def __getitems__(self, positions):
                clock.now += seconds
                return fetch(positions)

        loader.dataset.__class__ = SlowSplit
        return loader


class Takes(Callback):
    """Takes time in a step; in validation, which is none of training's; and when the epoch has ended."""

    def __init__(self, clock):
        self.clock = clock

    def on_train_batch_end(self, *_):
        self.clock.now += 0.25

    def on_validation_epoch_end(self, *_):
        self.clock.now += 1.0

    def on_train_epoch_end(self, *_):
        self.clock.now += 0.5


def fit(folder, clock, seconds):
    """Three batches before the validation and two after it."""
    runs = new_trainer(
        LastCheckpoint(), Takes(clock), Speed(), max_epochs=1, limit_train_batches=5, limit_val_batches=1, val_check_interval=3,
        num_sanity_val_steps=0, log_every_n_steps=2, default_root_dir=folder,
        logger=[MetricsCSV(folder), CSVLogger(folder, name="other", version="")],
    )  # fmt: skip
    folder.mkdir()
    # of a training whose checkpoint has gone
    (folder / "speed.csv").write_text("epoch,step,speed/epoch_s\n0,5,3.5\n7,40,2")
    runs.fit(Classifier(10, "resnet20_cifar", in_chans=1), datamodule=Slow(clock, seconds))
    (row,) = read_csv(folder / "speed.csv")
    return {name: float(value) for name, value in row.items()}


def test_the_share_of_waiting_is_the_loaders_and_validation_does_not_count(clock, tmp_path):
    quick, slow = fit(tmp_path / "quick", clock, 0.0), fit(tmp_path / "slow", clock, 0.75)
    for measured, waiting in ((quick, 0.0), (slow, 0.75)):
        assert measured["speed/data_wait"] == pytest.approx(waiting / (waiting + 0.25))
        assert measured["speed/images_per_s"] == pytest.approx(16 / (waiting + 0.25))
        assert measured["speed/epoch_s"] == pytest.approx(5 * (waiting + 0.25) + 1.0 + 0.5)
    assert 0.05 < quick["speed/peak_memory_gb"] < 50
    assert set(quick) - {"step"} <= set((tmp_path / "quick/other/metrics.csv").read_text().splitlines()[0].split(","))
    assert "speed" not in (tmp_path / "quick/metrics.csv").read_text()
    # two runs at different speeds: nothing that depends on time is in the checkpoint
    one, other = read(tmp_path / "quick"), read(tmp_path / "slow")
    assert [line for line in differences(one, other) if "speed" in line.lower()] == []
    assert "Speed" not in one["callbacks"]


def test_a_validation_alone_is_not_timed(tmp_path):
    model = Classifier(10, "resnet20_cifar", in_chans=1)
    new_trainer(Speed(), limit_val_batches=1, default_root_dir=tmp_path).validate(model, Digits(), verbose=False)
    assert not (tmp_path / "speed.csv").exists()


def test_an_epoch_within_which_a_run_goes_on_has_its_line_but_no_time_of_its_own(tmp_path, capsys):
    def train(*callbacks, **resume):
        runs = new_trainer(
            LastCheckpoint(every_n_steps=1), Speed(), Progress(), *callbacks, max_epochs=2, limit_train_batches=4, limit_val_batches=0,
            default_root_dir=tmp_path,
        )  # fmt: skip
        runs.fit(Classifier(10, "resnet20_cifar", in_chans=1), datamodule=Digits(), **resume)

    with pytest.raises(InterruptError):
        train(Interrupt(2))
    capsys.readouterr()
    train(ckpt_path=tmp_path / "checkpoints/last.ckpt", weights_only=True)
    rows = read_csv(tmp_path / "speed.csv")
    assert [(row["epoch"], row["speed/epoch_s"] != "") for row in rows] == [("0", False), ("1", True)]
    lines = [line[:9] for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines == ["epoch 1/2", "epoch 2/2"]


# --- what a step is made of --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "lr", "loss", "words"),
    [
        ((2, 64, 2), 0.1, DotRegressionLoss(class_balance="batch"), "256 = 2 processes x 64 images x 2 acc.*0.1 .*'batch' .exponent 1"),
        ((1, 32, 1), 0.003, CrossEntropyLoss(class_balance="global", exponent=0.5), "32 = 1 process x 32 .*0.003.*'global' .exponent 0.5"),
        ((1, 32, 1), None, CrossEntropyLoss(), "32 = 1 process x 32 images; class balance 'none'$"),
    ],
)  # fmt: skip
def test_the_line_says_what_one_step_is_made_of(shape, lr, loss, words):
    processes, batch_size, accumulated = shape
    assert re.search(
        words, describe_step(processes=processes, batch_size=batch_size, accumulated=accumulated, lr=lr, loss=loss)
    )
