import json
import math

import pytest

from etflight.utils.files import replacing, write_json


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


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "a.json", {"acc": math.nan, "sessions": [{"loss": math.inf, "rows": (1, -math.inf, 0.5)}]})
    assert json.loads((tmp_path / "a.json").read_text()) == {
        "acc": None,
        "sessions": [{"loss": None, "rows": [1, None, 0.5]}],
    }
