"""`metrics.csv` goes on where it was, and a logger that fails does not end the run."""

import pytest
from lightning.pytorch.loggers.logger import Logger

from etflight.runs.loggers import FailSafe, MetricsCSV, may_fall_silent
from etflight.utils.errors import UserError


def test_metrics_csv_goes_on_after_the_rows_that_its_checkpoint_knows(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(3):
        first.log_metrics({"epoch": 0, "loss": step / 2}, step)
    resumed = MetricsCSV(tmp_path, keep_rows=2)
    resumed.log_metrics({"epoch": 1, "acc": 0.5}, 9)
    assert (tmp_path / "metrics.csv").read_text().splitlines() == [
        "step,epoch,loss,acc", "0,0.0,0.0,", "1,0.0,0.5,", "9,1.0,,0.5"
    ]  # fmt: skip
    assert resumed.rows == 3


class Fragile(Logger):
    """Fails at the third call, or in its experiment."""

    name = version = "fragile"
    log_dir = "here"

    def __init__(self, error=None, starts=True):
        super().__init__()
        self.error, self.starts, self.calls = error or OSError("no route"), starts, []

    @property
    def experiment(self):
        if not self.starts:
            raise self.error
        return self.calls

    def log_hyperparams(self, *_):
        self.log_metrics({})

    def log_metrics(self, metrics, step=None):
        self.calls.append(step)
        if len(self.calls) == 3:
            raise self.error


def test_a_loader_process_that_dies_while_a_logger_works_is_not_blamed_on_the_logger(tmp_path, capsys):
    died = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
    logger = FailSafe(Fragile(died), tmp_path / "metrics.csv")
    logger.log_metrics({}, 0)
    logger.log_metrics({}, 1)
    with pytest.raises(RuntimeError, match="killed by signal"):
        logger.log_metrics({}, 2)
    assert capsys.readouterr().err == ""


def test_a_logger_that_fails_falls_silent_with_one_line_and_stays_what_it_is(tmp_path, capsys):
    inner = Fragile()
    logger = FailSafe(inner, tmp_path / "metrics.csv")
    assert isinstance(logger, Fragile)
    assert (logger.name, logger.log_dir, logger.experiment) == ("fragile", "here", inner.calls)
    for step in range(5):
        logger.log_metrics({}, step)
    logger.log_hyperparams({})
    assert inner.calls == [0, 1, 2]
    assert logger.experiment.log(1) is None
    with may_fall_silent(logger):
        raise OSError("again")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("etflight: warning: Fragile fell silent (no route): this run goes on without it")
    assert line.endswith(str(tmp_path / "metrics.csv"))


def test_an_experiment_that_does_not_start_silences_its_logger(tmp_path, capsys):
    logger = FailSafe(Fragile(starts=False), tmp_path)
    assert logger.experiment["run"].log(1) is None
    logger.log_metrics({})
    assert capsys.readouterr().err.count("Fragile fell silent") == 1


def test_the_users_own_errors_and_those_of_other_loggers_are_raised(tmp_path):
    logger = FailSafe(Fragile(UserError("give another"), starts=False), tmp_path)
    with pytest.raises(UserError):
        _ = logger.experiment
    with pytest.raises(OSError, match="theirs"), may_fall_silent(Fragile()):
        raise OSError("theirs")
