"""A trainer in Python does what `etflight fit` does."""

from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import StochasticWeightAveraging

from etflight import Classifier
from etflight.callbacks import NeuralCollapseMonitor, StochasticWeightAverage, default_callbacks
from etflight.data import Digits
from etflight.runs.loggers import MetricsCSV
from tests.training import fit_digits, new_trainer, read_csv


def test_a_training_in_python_is_that_of_the_command_line(tmp_path):
    run = fit_digits(tmp_path, "--data.max_count", 20, "--trainer.max_epochs", 2)
    seed_everything(0)
    folder = tmp_path / "python"
    trainer = new_trainer(*default_callbacks(), max_epochs=2, default_root_dir=folder, logger=MetricsCSV(folder))
    model, data = Classifier(10, "resnet20_cifar", in_chans=1), Digits(max_count=20)
    trainer.fit(model, datamodule=data)
    assert read_csv(tmp_path / "python/metrics.csv") == read_csv(run / "metrics.csv")
    assert {"checkpoints", "speed.csv", "gram"} <= {path.name for path in (tmp_path / "python").iterdir()}

    trainer.test(model, datamodule=data, verbose=False)
    assert (tmp_path / "python/test_metrics.json").is_file()


def test_what_is_your_own_takes_the_place_of_what_comes_by_default():
    average, monitor = StochasticWeightAveraging(0.05), NeuralCollapseMonitor(every_n_epochs=5)
    given = default_callbacks([average, monitor], checkpoint=False)
    assert [callback for callback in given if isinstance(callback, NeuralCollapseMonitor)] == [monitor]
    assert [type(c) for c in given if isinstance(c, StochasticWeightAveraging)] == [StochasticWeightAverage]
    assert not [c for c in default_callbacks(monitor=False) if isinstance(c, NeuralCollapseMonitor)]
