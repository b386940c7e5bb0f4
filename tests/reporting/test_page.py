import json
import re
import shutil
import tempfile

import numpy as np
import pytest

from etflight.cli.report import main as report
from etflight.reporting.groups import group
from etflight.reporting.page import write_page
from etflight.reporting.results import read_results
from etflight.utils.errors import UserError
from tests.reporting.folders import COUNTS, make_run, write_csv
from tests.reporting.test_frames import K, cosines, leave

EVIL = "</script><img src=x onerror=pwned=1><b>&\"'`${pwned=1}"


def classes(names):
    rows = zip(names, COUNTS, (1.0, 0.25, 0.5), strict=True)
    return [{"class": k, "name": name, "train_images": n, "acc": acc} for k, (name, n, acc) in enumerate(rows)]


def make_runs(parent):
    folders = []
    for arm in ("ce", "etf"):
        for seed in (0, 1):
            run = make_run(parent / f"{arm}_{seed}", arm=arm, seed=seed, acc=0.5 + seed / 8)
            leave(run, seed=seed)
            write_csv(run / "per_class.csv", classes("abc"))
            (run / "config.yaml").write_text(f"seed_everything: {seed}\nmodel: {{head: {arm}, lr: 0.1}}\n")
            folders.append(run)
    return folders


@pytest.fixture
def runs(tmp_path):
    return make_runs(tmp_path)


def write(path, folders):
    results, problems = read_results(folders)
    assert problems == []
    return write_page(path, group(results)[0])


def content(path):
    html = path.read_text()
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_holds_tables_curves_classes_and_differences(runs, tmp_path):
    assert write(tmp_path / "report.html", runs) == []
    (section,) = content(tmp_path / "report.html")["sections"]
    assert section["arms"] == ["ce", "etf"]
    assert section["rows"][0][2] == "56.2 ± 8.8"
    assert [(run["arm"], run["seed"]) for run in section["runs"][1:3]] == [("ce", "1"), ("etf", "0")]
    curves = section["runs"][0]["curves"]
    assert curves["train/loss"] == [[1, 2, 3], [3, 2, 1]]
    assert curves["nc/train/nc1"] == [[0, 1, 2, 3], [2, 1, 0.5, 0.33333]]  # the first before training
    assert section["runs"][0]["classes"] == {"names": ["a", "b", "c"], "counts": COUNTS, "acc": [1.0, 0.25, 0.5]}
    rows = {row[0]: row[1:] for row in section["differences"]["rows"]}
    assert rows == {"seed_everything": ["0", "1", "0", "1"], "model.head": ['"ce"', '"ce"', '"etf"', '"etf"']}


def test_measurements_within_an_epoch_stand_at_their_steps(runs, tmp_path):
    rows = [
        {"step": s, "epoch": s // 10, "val/acc": 0.5, "train/loss": 1.0 if s % 10 == 9 else None}
        for s in (4, 9, 14, 19)
    ]
    write_csv(runs[0] / "metrics.csv", rows)
    write(tmp_path / "report.html", runs[:1])
    assert content(tmp_path / "report.html")["sections"][0]["runs"][0]["curves"]["val/acc"][0] == [0.5, 1, 1.5, 2]


def test_the_page_asks_nothing_of_the_network_and_no_name_ends_its_data_or_starts_a_tag(tmp_path):
    run = make_run(tmp_path / "r", arm=EVIL, seed=EVIL, hardware={"cpu": EVIL}, command=EVIL)
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


# --- in a browser ------------------------------------------------------------------------------------------------------

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (the extra test) is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield opened
        opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write(folder / "report.html", make_runs(folder))
    return folder / "report.html"


def open_page(browser, path, width=1280, scheme="light"):
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())


def requests(browser):
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("data:", "chrome:"))]  # the latter are the browser's own


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_draws_without_errors_requests_or_overflow(width, scheme, browser, page):
    open_page(browser, page, width, scheme)
    assert browser.get_log("browser") == []
    assert requests(browser) == [page.as_uri()]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.card')].map(c => c.querySelector('svg') !== null)"
    )
    assert len(drawn) == 4 + 2 * 2 + 1  # curves with numbers, triangle and heat map of each arm, classes by size
    assert all(drawn)
    ground, text = browser.execute_script(
        "const sum = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0), s = getComputedStyle(document.body);"
        "return [sum(s.backgroundColor), sum(s.color)]"
    )
    assert (text - ground if scheme == "dark" else ground - text) > 450  # text can be told from its ground


def test_pressing_an_arm_hides_its_curves_and_pictures(browser, page):
    open_page(browser, page)
    lines = "return document.querySelector('.chart').data.length"
    cards = "return [...document.querySelectorAll('.heat')].filter(c => c.offsetParent !== null).length"
    assert (browser.execute_script(lines), browser.execute_script(cards)) == (4, 2)
    browser.execute_script("document.querySelector('button[aria-pressed]').click()")
    assert (browser.execute_script(lines), browser.execute_script(cards)) == (2, 1)


def in_plane(W, points):
    """Coordinates in the plane through three points, by orthogonalisation: the first at the top."""
    origin = W.mean(0)
    up = (W[0] - origin) / np.linalg.norm(W[0] - origin)
    right = (W[2] - W[1]) - ((W[2] - W[1]) @ up) * up
    return (points - origin) @ np.stack([right / np.linalg.norm(right), up]).T


def test_the_slider_moves_embeddings_and_heat_map_to_an_epoch(browser, page, tmp_path):
    open_page(browser, page)
    browser.execute_script(
        "const s = document.querySelector('input[type=range]'); s.value = 1; s.dispatchEvent(new Event('input'));"
        "const picks = document.querySelectorAll('select'); [3, 0, 4].forEach((k, i) => { picks[i].value = k; });"
        "picks[0].dispatchEvent(new Event('change'));"
    )
    M, W, H, labels = leave(tmp_path / "again")[1]
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (W, M, H)]
    traces = browser.execute_script(
        "return document.querySelector('.triangle').data.map(t => [[...t.x].map(Number), [...t.y].map(Number)])"
    )
    three = [3, 0, 4]
    for corner, k in enumerate(three):
        embeddings, mean = (np.array(traces[1 + 2 * corner + i]).T for i in range(2))
        np.testing.assert_allclose(embeddings, in_plane(unit[0][three], unit[2][labels == k]), atol=1e-3)
        np.testing.assert_allclose(mean, in_plane(unit[0][three], unit[1][[k]]), atol=1e-3)
    np.testing.assert_allclose(np.array(traces[-1]).T, in_plane(unit[0][three], unit[0][three]), atol=1e-3)
    heat = browser.execute_script("return document.querySelector('.heat').data[0].z.map(row => [...row])")
    np.testing.assert_allclose(heat, cosines(M - M.mean(0), W - W.mean(0)), atol=1e-3)
    assert "epoch 1" in browser.execute_script("return document.querySelector('output').textContent")
    assert len(heat) == K


def test_names_are_shown_as_they_are_and_run_nothing(browser, tmp_path):
    run = make_run(tmp_path / "r", arm=EVIL, seed=EVIL, hardware={"cpu": EVIL}, command=EVIL)
    leave(run, classes=3)
    write_csv(run / "per_class.csv", classes([EVIL, "<i>short</i>", "%{x}"]))
    (run / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    path = tmp_path / "report.html"
    write(path, [run])
    open_page(browser, path)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return typeof pwned") == "undefined"
    assert (
        browser.execute_script("return document.querySelectorAll('main img, main b, main i, main script').length") == 0
    )
    assert EVIL in browser.execute_script("return document.querySelector('button[aria-pressed]').textContent")
    shown = browser.execute_script("return [...document.querySelectorAll('.triangle text')].map(t => t.textContent)")
    assert "<i>short</i>" in shown
    assert "%{x}" in shown
