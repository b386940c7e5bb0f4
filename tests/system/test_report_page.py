"""The page of a report as a browser shows it."""

import json
import shutil
import tempfile
from itertools import chain

import numpy as np
import pytest

from tests.reporting.folders import EVIL, classes, cosines, leave, make_run, make_runs, write, write_csv

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-quic", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium (the extra test) is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver is installed")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        yield opened
        opened.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    assert write(folder / "report.html", make_runs(folder)) == []
    return folder / "report.html"


def open_page(browser, path, width=1280, scheme="light"):
    """Returns what the browser complains of, and the addresses that it asks for."""
    colours = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", colours)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(path.as_uri())
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    own = ("data:", "chrome:", "chrome-untrusted:")  # no requests, and those of the browser's own pages
    return browser.get_log("browser"), [url for url in sent if not url.startswith(own)]


def test_results_and_runs_need_no_scrollbar_at_1280_pixels(browser, page):
    open_page(browser, page)
    hidden = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map((e) => e.scrollWidth - e.clientWidth)"
    )
    assert (hidden[0], hidden[-1]) == (0, 0)


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_draws_without_errors_requests_or_overflow(width, scheme, browser, page):
    assert open_page(browser, page, width, scheme) == ([], [page.as_uri()])
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    drawn = browser.execute_script("return [...document.querySelectorAll('.card')].map(c => !!c.querySelector('svg'))")
    assert drawn == [True] * (4 + 2 * 2 + 1)  # curves with numbers, triangle and heat map of each arm, classes by size
    ground, text = browser.execute_script(
        "const sum = c => c.match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0), s = getComputedStyle(document.body);"
        "return [sum(s.backgroundColor), sum(s.color)]"
    )
    assert (text - ground if scheme == "dark" else ground - text) > 450  # text can be told from its ground


def test_the_axes_of_a_short_curve_have_numbers_and_whole_epochs_also_with_no_power_of_ten_near(browser, tmp_path):
    run = make_run(tmp_path / "r")
    write_csv(run / "metrics.csv", [{"step": s, "epoch": s, "nc/train/nc1": v} for s, v in enumerate((19, 17.2, 14.4))])
    write(tmp_path / "report.html", [run])
    open_page(browser, tmp_path / "report.html")
    x, y = browser.execute_script(
        "const texts = k => [...document.querySelector('.chart').querySelectorAll(k)].map(t => t.textContent);"
        "return [texts('.xtick text'), texts('.ytick text')]"
    )
    assert x == ["1", "2", "3"]
    assert len(y) >= 2


def test_pressing_an_arm_hides_its_curves_and_pictures(browser, page):
    open_page(browser, page)
    count = (
        "return [document.querySelector('.chart').data.length, "
        "[...document.querySelectorAll('.heat')].filter(c => c.offsetParent !== null).length]"
    )
    assert browser.execute_script(count) == [4, 2]
    browser.execute_script("document.querySelector('button[aria-pressed]').click()")
    assert browser.execute_script(count) == [2, 1]


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
    w, m, h = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (W, M, H))
    shown = browser.execute_script(
        "return document.querySelector('.triangle').data.map(t => [[...t.x].map(Number), [...t.y].map(Number)])"
    )
    three = [3, 0, 4]
    expected = [*chain.from_iterable((h[labels == k], m[[k]]) for k in three), w[three]]  # after the triangle's edges
    for points, trace in zip(expected, shown[1:], strict=True):
        np.testing.assert_allclose(np.array(trace).T, in_plane(w[three], points), atol=1e-3)
    heat = browser.execute_script("return document.querySelector('.heat').data[0].z.map(row => [...row])")
    np.testing.assert_allclose(heat, cosines(M - M.mean(0), W - W.mean(0)), atol=1e-3)
    assert "epoch 1" in browser.execute_script("return document.querySelector('output').textContent")


def test_names_are_shown_as_they_are_and_run_nothing(browser, tmp_path):
    run = make_run(tmp_path / "r", arm=EVIL, hardware={"cpu": EVIL}, command=EVIL)
    leave(run, classes=3)
    write_csv(run / "per_class.csv", classes([EVIL, "<i>short</i>", "%{x}"]))
    (run / "config.yaml").write_text(json.dumps({EVIL: EVIL}))
    assert write(tmp_path / "report.html", [run]) == []
    assert open_page(browser, tmp_path / "report.html")[0] == []
    alive = "document.querySelectorAll('main img, main b, main i, main script').length"
    assert browser.execute_script(f"return [typeof pwned, {alive}]") == ["undefined", 0]
    assert EVIL in browser.execute_script("return document.querySelector('button[aria-pressed]').textContent")
    shown = browser.execute_script("return [...document.querySelectorAll('.triangle text')].map(t => t.textContent)")
    assert {"<i>short</i>", "%{x}"} <= set(shown)
