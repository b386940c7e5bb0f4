import json
import re

import pytest

from etflight.cli.report import main as report
from etflight.utils.errors import UserError
from tests.reporting.folders import COUNTS, EVIL, classes, make_run, make_runs, write, write_csv


@pytest.fixture
def runs(tmp_path):
    return make_runs(tmp_path)


def content(path):
    html = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_holds_tables_curves_classes_and_differences(runs, tmp_path):
    assert write(tmp_path / "report.html", runs) == []
    (section,) = content(tmp_path / "report.html")["sections"]
    assert section["arms"] == ["ce", "etf"]
    assert section["rows"][0][2:4] == ["last", "56.2 ± 8.8"]
    assert [(run["arm"], run["seed"]) for run in section["runs"][1:3]] == [("ce", "1"), ("etf", "0")]
    curves = section["runs"][0]["curves"]
    assert curves["train/loss"] == [[1, 2, 3], [3, 2, 1]]
    assert curves["nc/train/nc1"] == [[0, 1, 2, 3], [2, 1, 0.5, 0.33333]]  # the first before training
    assert section["runs"][0]["classes"] == {"names": ["a", "b", "c"], "counts": COUNTS, "acc": [1.0, 0.25, 0.5]}
    rows = {row[0]: row[1:] for row in section["differences"]["rows"]}
    assert rows == {"seed_everything": ["0", "1", "0", "1"], "model.head": ["ce", "ce", "etf", "etf"]}


def test_runs_of_different_classes_differ_in_one_row_for_the_class_with_its_options(tmp_path):
    heads = {"ce": {"class_path": "etflight.heads.LinearHead", "init_args": {"use_bias": True}},
             "etf": {"class_path": "etflight.ETFHead", "init_args": {"scale": 16.0, "seed": 0}}, "none": None}  # fmt: skip
    for arm, head in heads.items():
        run = make_run(tmp_path / arm, arm=arm)
        model = {"lr": 0.1, **({"head": head} if head else {})}
        (run / "config.yaml").write_text(json.dumps({"model": model | ({"bias": 1} if arm == "ce" else {})}))
    write(tmp_path / "report.html", [tmp_path / arm for arm in heads])
    rows = content(tmp_path / "report.html")["sections"][0]["differences"]["rows"]
    assert rows == [
        ["model.head", "LinearHead(use_bias=true)", "ETFHead(scale=16.0, seed=0)", "–"],
        ["model.bias", "1", "–", "–"],
    ]


def test_measurements_within_an_epoch_stand_at_their_steps(runs, tmp_path):
    rows = [
        {"step": s, "epoch": s // 10, "val/acc": 0.5, "train/loss": 1.0 if s % 10 == 9 else None}
        for s in (4, 9, 14, 19)
    ]
    write_csv(runs[0] / "metrics.csv", rows)
    write(tmp_path / "report.html", runs[:1])
    assert content(tmp_path / "report.html")["sections"][0]["runs"][0]["curves"]["val/acc"][0] == [0.5, 1, 1.5, 2]


def test_the_page_asks_nothing_of_the_network_and_no_name_ends_its_data_or_starts_a_tag(tmp_path):
    run = make_run(tmp_path / "r", arm=EVIL, hardware={"cpu": EVIL}, command=EVIL)
    write_csv(run / "per_class.csv", classes([EVIL] * 3))
    (run / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    write(tmp_path / "report.html", [run])
    own = (tmp_path / "report.html").read_text().partition("<script>")[0]
    assert re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?([^\"' >]+)", own) == ["data:,"]
    assert "default-src 'none'" in own
    (section,) = content(tmp_path / "report.html")["sections"]
    assert section["arms"] == [EVIL]
    assert section["runs"][0]["classes"]["names"] == [EVIL] * 3


def test_a_damaged_part_is_named_and_the_rest_shown(runs, tmp_path):
    (runs[0] / "per_class.csv").write_text("class,name\n0")
    (runs[1] / "config.yaml").write_text("a: [")
    (runs[2] / "gram" / "epoch_001.npz").write_bytes(b"PK")
    remarks = write(tmp_path / "report.html", runs)
    for run, name, remark in zip(
        runs[:3], ("per_class.csv", "config.yaml", "gram/epoch_001.npz"), remarks, strict=True
    ):
        assert str(run / name) in remark
    (section,) = content(tmp_path / "report.html")["sections"]
    assert [run["curves"] != {} for run in section["runs"]] == [True] * 4
    assert [run["frames"] is not None for run in section["runs"]] == [True, True, False, True]


def test_only_a_page_of_ours_is_replaced(runs, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("<html>my thesis</html>")
    with pytest.raises(UserError, match="stays as it is"):
        write(path, runs)
    assert path.read_text() == "<html>my thesis</html>"
    path.unlink()
    write(path, runs[:1])
    write(path, runs)
    assert len(content(path)["sections"][0]["runs"]) == 4


def test_without_plotly_the_extra_is_named(runs, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(UserError, match=r"etflight\[report\]"):
        write(tmp_path / "report.html", runs)
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page_and_names_what_is_left_out(runs, tmp_path, capsys):
    path = tmp_path / "report.html"
    report([str(runs[0]), "nowhere", "-o", str(path)])
    out, err = capsys.readouterr()
    assert out == f"{path}\n"
    assert "nowhere" in err
    assert len(content(path)["sections"][0]["runs"]) == 1
    for argv in (["-o", str(tmp_path / "r.pdf")], ["--html", str(tmp_path / "r.html"), "--format", "md"]):
        with pytest.raises(SystemExit, match="2"):
            report([str(runs[0]), *argv])
    assert not list(tmp_path.glob("r.*"))
