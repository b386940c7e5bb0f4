"""What this machine or a run cannot do is refused before training."""

import pytest

from tests.training import DIGITS

BARE = [word for word in DIGITS if word not in ("--trainer.accelerator", "cpu")]


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "tpu"])
def test_hardware_that_is_not_there_is_refused_in_one_line_with_the_mend(etflight_command, tmp_path, accelerator):
    run = etflight_command("fit", *BARE, "--trainer.accelerator", accelerator, cwd=tmp_path, CUDA_VISIBLE_DEVICES="")
    run.assert_refused(f"--trainer.accelerator is {accelerator}, but PyTorch finds none on this machine: give auto")


def test_hardware_that_nobody_knows_is_refused_with_those_that_exist(etflight_command, tmp_path):
    run = etflight_command("fit", *BARE, "--trainer.accelerator", "qpu", cwd=tmp_path)
    run.assert_refused("--trainer.accelerator 'qpu' is unknown: give auto, gpu, cpu, cuda, mps, tpu")
