from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from etflight import plotting


def drawn(figure: Figure, tmp_path: Path) -> np.ndarray:
    plotting.save(figure, tmp_path / "figure.png")
    return np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
