import csv
import re

import pytest

FIT = [
    "fit", "--data", "Digits", "--data.max_count", 10, "--data.batch_size", 20, "--model.backbone", "resnet20_cifar",
    "--trainer.accelerator", "cpu", "--trainer.max_epochs", 2, "--trainer.log_every_n_steps", 2,
    "--trainer.enable_model_summary", "false", "--trainer.callbacks+", "NeuralCollapseMonitor", "--name", "r",
]  # fmt: skip


@pytest.fixture(scope="module")
def terminal(etflight_command, tmp_path_factory):
    """What a terminal shows, and what is logged."""
    cwd = tmp_path_factory.mktemp("terminal")
    sent = etflight_command.in_terminal(*FIT, cwd=cwd, CI="")
    rows = list(csv.DictReader((cwd / "runs/r/metrics.csv").open()))
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent), rows


def epoch_lines(text):
    return re.findall(r"epoch [^\r\n]+", text)


def test_the_bar_shows_loss_accuracy_alignment_speed_and_the_time_left(terminal):
    text, _ = terminal
    for shown in (
        r"loss: [\d.]+",
        r"val/acc: [\d.]+",
        r"alignment: -?[\d.]+",
        r"images/s: \d+",
        r"left: \d+:\d\d:\d\d",
    ):
        assert re.search(shown, text), shown


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


@pytest.mark.parametrize("env", [{"CI": "true"}, {"CI": "", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "bash"}])
def test_ci_and_batch_systems_get_the_lines_without_the_bar(env, etflight_command, tmp_path):
    sent = etflight_command.in_terminal(*FIT, "--trainer.max_epochs", 1, cwd=tmp_path, **env)
    assert len(epoch_lines(sent)) == 1
    assert "images/s: " not in sent


def test_a_file_gets_the_lines_without_the_bar_unless_it_is_asked_for(etflight_command, tmp_path):
    short = [*FIT, "--trainer.max_epochs", 1]
    plain = etflight_command(*short, cwd=tmp_path, CI="")
    asked = etflight_command(*short, "--trainer.enable_progress_bar", "true", "--name", "s", cwd=tmp_path, CI="true")
    for result, bar in ((plain, False), (asked, True)):
        assert result.status == 0, result.err
        assert len(epoch_lines(result.out)) == 1
        assert ("images/s: " in result.out) == bar
