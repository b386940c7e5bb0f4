import os
import pickle

import numpy as np
import pytest
import torch

from etflight.data.files import Paths, files_below

NAMES = ["a/one.jpg", "b/two words.jpg", "top.jpg", "b/ä.jpg", "a/c/deep.jpg"]


def test_paths_come_back_as_they_were_given():
    paths = Paths.pack("root", NAMES)
    assert paths.relative(range(len(paths))) == NAMES
    assert paths.relative([3, 0]) == [NAMES[3], NAMES[0]]
    assert [paths[i] for i in range(len(paths))] == [os.path.join("root", name) for name in NAMES]
    assert len(Paths.pack("root", [])) == 0


def test_a_path_that_is_no_text_comes_back_too():
    name = os.fsdecode(b"a/\xff.jpg")
    assert Paths.pack("", [name])[0] == name


def test_many_paths_are_few_objects_so_that_processes_share_them():
    paths = Paths.pack("root", [f"class/{i}.jpg" for i in range(10_000)])
    tensors = [value for value in vars(paths).values() if isinstance(value, torch.Tensor)]
    others = {name: value for name, value in vars(paths).items() if not isinstance(value, torch.Tensor)}
    assert others == {"root": "root"}
    assert sum(tensor.nbytes for tensor in tensors) < 10_000 * 32
    assert [pickle.loads(pickle.dumps(paths))[i] for i in (0, 9_999)] == ["root/class/0.jpg", "root/class/9999.jpg"]


@pytest.mark.parametrize("seed", range(3))
def test_missing_files_are_those_that_do_not_exist(tmp_path, seed):
    names = [f"{folder}/{i}.jpg" for folder in ("a", "b", "a/c", "gone") for i in range(20)] + ["top.jpg", "none.jpg"]
    there = np.random.default_rng(seed).random(len(names)) < 0.7
    for name, exists in zip(names, there, strict=True):
        if exists and not name.startswith("gone"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).touch()
    shuffled = np.random.default_rng(seed).permutation(names).tolist()
    paths = Paths.pack(str(tmp_path), shuffled)
    assert paths.missing() == [i for i in range(len(paths)) if not os.path.exists(paths[i])]


def test_files_below_a_folder_are_sorted_part_by_part(tmp_path):
    for name in ("b.png", "a/z.PNG", "a-1.png", "a/.hidden.png", "notes.txt", "a/b/c.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    assert files_below(str(tmp_path), {".png", ".jpg"}) == ["a/b/c.jpg", "a/z.PNG", "a-1.png", "b.png"]
    assert files_below(str(tmp_path / "none"), {".png"}) == []
