"""What a second stage takes from files that it shares with the first one."""

import pytest
import yaml

from etflight.cli.argv import EarlyOptions
from etflight.cli.second_stage import leave_out_first_stage
from etflight.utils.shipped import find_config

PARSED = {
    "checkpoint": "first.ckpt", "weights": "w.pth", "freeze": ["backbone"], "unfreeze_epoch": 3, "freeze_statistics": True,
}  # fmt: skip


def left(files, *words, **parsed):
    tuning = PARSED | parsed
    leave_out_first_stage(tuning, EarlyOptions.of("etflight fit", [str(file) for file in files], words))
    return [tuning[name] for name in ("weights", "freeze", "unfreeze_epoch")]


@pytest.mark.parametrize("protocol", ["fine_tuning", "lite0_weights"])
@pytest.mark.parametrize("arm", ["crt", "lws", "mislas", "mislas_cifar100", "etf_mislas"])
def test_a_second_stage_is_frozen_as_its_arm_says_before_or_after_the_protocol_of_the_first(arm, protocol):
    files = [find_config(f"protocols/{protocol}"), find_config(f"arms/{arm}")]
    frozen = yaml.safe_load(files[1].read_text())["fine_tuning"]["freeze"]
    assert left(files) == left(files[::-1]) == [None, frozen, None]
    assert left(files, "--fine_tuning.weights", "null", weights=None) == [None, frozen, None]


def test_the_command_line_goes_before_all_files():
    files = [find_config("protocols/fine_tuning"), find_config("arms/crt")]
    assert left(files, "--fine_tuning.unfreeze_epoch=3") == [None, ["backbone"], 3]
    assert left(files, "--fine_tuning.weights", "w.pth") == ["w.pth", ["backbone"], None]


def test_files_that_speak_of_one_stage_alone_are_taken_as_they_are(tmp_path):
    mine, protocol = tmp_path / "mine.yaml", find_config("protocols/fine_tuning")
    mine.write_text("fine_tuning: {load: {backbone: backbone}, freeze: [layer1], unfreeze_epoch: 3}")
    given = [PARSED["weights"], PARSED["freeze"], PARSED["unfreeze_epoch"]]
    assert left([mine]) == given
    assert left([protocol]) == given  # what to load is on the command line
    assert left([protocol, mine], checkpoint=None) == given
    assert left([protocol, mine]) == [None, ["layer1"], 3]
