import pytest

from etflight.utils.files import replacing


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
