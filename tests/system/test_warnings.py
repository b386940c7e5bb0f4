"""What other libraries tell programmers is not told to users, even where they ask Python for all warnings."""

import os
import subprocess
import sys

from tests.training import DIGITS

LIBRARY = """
import etflight
from etflight.callbacks import CollapseFigures, NeuralCollapseMonitor
from etflight.data import Digits
from lightning.pytorch import Trainer

model = etflight.Classifier(10, "resnet20_cifar", in_chans=1)
callbacks = [NeuralCollapseMonitor(), CollapseFigures()]
trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=callbacks, limit_train_batches=2, logger=False, enable_checkpointing=False)
trainer.fit(model, Digits(val_fraction=0.1, mixup=1.0))
trainer.test(model, Digits(), verbose=False)
"""


def told(*argv, cwd):
    """What a fresh interpreter that shows all warnings prints, on a machine with SLURM's client."""
    client = cwd / "bin" / "srun"
    client.parent.mkdir(exist_ok=True)
    client.touch(0o755)
    argv = [sys.executable, "-W", "default", *map(str, argv)]
    env = {**os.environ, "PATH": f"{client.parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_commands_pass_on_no_warning_and_no_tip_of_another_library(tmp_path):
    averaged = ["--trainer.callbacks+=EMAWeightAveraging", "--trainer.precision", "bf16-mixed", "--data.num_workers", 1]
    more = [*averaged, "--name", "r", "--trainer.enable_model_summary", "true"]
    fit = told("-m", "etflight", "fit", *DIGITS, *more, cwd=tmp_path)
    test = told("-m", "etflight", "test", *DIGITS, "--name", "r", "--ckpt_path", "last", cwd=tmp_path)
    for text in (fit, test):
        assert "site-packages" not in text
        assert "Tip" not in text
        assert "srun" not in text


def test_a_training_in_python_meets_no_deprecation_and_no_tip(tmp_path):
    text = told("-c", LIBRARY, cwd=tmp_path)
    assert "eprecat" not in text
    assert "Tip" not in text
    assert "srun" not in text


def test_importing_the_package_says_nothing(tmp_path):
    parts = ["classifier", "heads", "data", "callbacks", "backbones", "metrics", "plotting", "export.card"]
    assert told("-c", f"import {', '.join(f'etflight.{part}' for part in parts)}", cwd=tmp_path) == ""
