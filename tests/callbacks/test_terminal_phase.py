from pathlib import Path

import pytest

from tests.training import read_csv


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_balanced_digits_collapse_in_the_terminal_phase(tmp_path):
    from etflight.cli.stages import main

    configs = Path(__file__).parents[2] / "configs"
    files = [f"--config={configs / file}" for file in ("data/digits_collapse.yaml", "arms/etf_dr.yaml")]
    args = ["fit", *files, f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu"]
    main([*args, "--trainer.enable_progress_bar=false"])
    rows = [row for row in read_csv(tmp_path / "digits_collapse/etf_dr/metrics.csv") if row["nc/train/nc1"]]
    assert len(rows) == 151  # the untrained model, then each epoch
    nc1, alignment = ([float(row[f"nc/train/{name}"]) for row in rows] for name in ("nc1", "alignment"))
    assert alignment[-1] >= 0.99 > alignment[1] > alignment[0]
    assert nc1[-1] <= 0.02 < nc1[1] < nc1[0]
