import threading

import numpy as np
from matplotlib import pyplot
from PIL import Image

from etflight import plotting


def test_save_replaces_a_picture_and_leaves_nothing_else(noise, tmp_path):
    path = tmp_path / "figures" / "spectrum.png"
    for n in (3, 5):
        plotting.save(plotting.spectrum(np.arange(1, n)), path)
    assert [file.name for file in path.parent.iterdir()] == ["spectrum.png"]
    assert Image.open(path).size == (840, 576)


def test_figures_are_unknown_to_pyplot_and_can_be_drawn_in_threads(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    workers = [threading.Thread(target=lambda p=p: plotting.save(plotting.spectrum([3, 2, 1]), p)) for p in paths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert pyplot.get_fignums() == []
