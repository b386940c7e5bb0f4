import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_python_examples_run_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 3
    names = {"__name__": "readme"}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["monitor"].history["nc/train/nc1"]) == 3
    assert 0 < names["statistics"].compute().counts.sum() == 60


def test_every_file_it_names_exists():
    named = re.findall(r"(?:configs|notebooks)/[\w./-]+\.(?:yaml|png|gif|json)", README)
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_map_of_the_house_has_every_room():
    drawn = re.search(r"```\netflight/\n(.*?)```", README, flags=re.DOTALL)[1]
    named = {name for line in drawn.splitlines() for name in re.findall(r"(\w+(?:/|\.py))(?=,|  | *$)", line[:60])}
    there = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "etflight").iterdir()}
    assert named == there - {"__init__.py", "_version.py", "py.typed", "__pycache__/"}
