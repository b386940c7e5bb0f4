import json
import math
import threading

import pytest

from etflight.utils.files import replacing, write_json
from tests.waiting import DEADLINE


def _write_half(path):
    with replacing(path) as partial, partial.open("w") as file:
        file.write("half")
        file.write(None)


def test_a_file_is_replaced_only_when_its_writing_ends_well(tmp_path):
    path = tmp_path / "new" / "a.json"
    with replacing(path) as partial:
        partial.write_text("old")
        assert not path.exists()
        assert partial.suffix == ".json"
    with pytest.raises(TypeError):
        _write_half(path)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_of_two_that_write_a_file_at_once_one_waits_for_the_other(tmp_path):
    path, begun = tmp_path / "a.txt", []

    def write(text, *, meanwhile=None):
        with replacing(path) as partial, partial.open("w") as file:
            begun.append(text)
            if meanwhile is not None:
                meanwhile.start()
                meanwhile.join(0.3)
                assert begun == [text]
            file.write(text)

    second = threading.Thread(target=write, args=("second",))
    write("the first", meanwhile=second)
    second.join(DEADLINE)
    assert begun == ["the first", "second"]
    assert path.read_text() == "second"
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"acc": math.nan, "sessions": [{"loss": math.inf, "rows": (1, -math.inf, 0.5)}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "acc": None,
        "sessions": [{"loss": None, "rows": [1, None, 0.5]}],
    }
