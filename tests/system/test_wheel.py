"""The package as a stranger installs it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*argv: object, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(a) for a in argv], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_wheel_trains_a_step_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("etflight-*.whl")
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    place = run(python, "-c", "import etflight; print(etflight.__file__)", cwd=tmp_path)
    assert place.startswith(str(tmp_path / "empty"))
    etflight = tmp_path / "empty" / "bin" / "etflight"
    assert "etf_dr_balanced" in run(etflight, "configs", "arms", cwd=tmp_path)
    step = ["-c", "configs/data/digits.yaml", "-c", "configs/arms/etf_dr_balanced.yaml", "--trainer.max_steps", 1]
    run(etflight, "fit", *step, "--trainer.accelerator", "cpu", cwd=tmp_path)
    assert (tmp_path / "runs/digits/etf_dr_balanced/checkpoints/last.ckpt").is_file()
    shutil.rmtree(tmp_path / "empty")  # gigabytes, which pytest would keep
