"""The report in a real browser: drawn, wide enough, narrow enough, and legible in the dark."""

import json
import shutil

import pytest

from coterie.experiment import report

browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (browser and driver), reason="needs chromium and chromedriver on PATH")

NAME = "<script>document.title = 'taken'</script>"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
)
# Every text on the page with the contrast (WCAG 2.2) to the nearest opaque background behind it.
CONTRASTS = """
const rgb = c => c.match(/[\\d.]+/g).map(Number);
const luminance = c => rgb(c).slice(0, 3).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const opaque = c => rgb(c).length < 4 || rgb(c)[3] == 1;
const background = e => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (opaque(c)) return c;
  }
  return 'rgb(255, 255, 255)';
};
const texts = [...document.querySelectorAll('svg text, h1, h2, p, dt, dd, td, th, pre, .status')];
return texts.map(e => {
  const style = getComputedStyle(e), color = e.closest('svg') ? style.fill : style.color;
  const [low, high] = [luminance(color), luminance(background(e))].sort((a, b) => a - b);
  return [e.textContent.slice(0, 40), (high + 0.05) / (low + 0.05)];
});
"""
FIGURES = """
return [...document.querySelectorAll('svg')].map(svg => {
  const box = svg.getBoundingClientRect();
  const drawn = [...svg.querySelectorAll('path, image')].filter(e => {
    const b = e.getBoundingClientRect();
    return b.width + b.height > 5;
  });
  return [svg.getAttribute('aria-label'), box.width, box.height, drawn.length];
});
"""


@pytest.fixture(scope="module")
def pages(make_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    full = make_run(root / "full", rounds=12, clients=30)
    bare = make_run(root / "bare", rounds=3, clients=3, name=NAME)
    for file in ("metrics.jsonl", "clients.json"):
        (bare / file).unlink()
    (bare / "result.json").write_text(json.dumps({"name": NAME, "status": "failed", "error": "x" * 500}))
    many = make_run(root / "a-rather-long-name-that-does-not-break", clients=1000, rounds=100)
    return {
        "full": report.write(full),
        "bare": report.write(bare),
        "many": report.write(many),
        "compare": report.write_compare_html(root / "compare.html", [full, many]),
    }


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    window = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield window
    window.quit()


def look(chromium, page, width=1200, scheme="light"):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    chromium.get(page.as_uri())
    assert chromium.get_log("browser") == []
    return chromium.execute_script


@pytest.mark.parametrize(("name", "count"), [("full", 6), ("many", 6), ("compare", 1), ("bare", 0)])
def test_every_figure_is_drawn(chromium, pages, name, count):
    figures = look(chromium, pages[name])(FIGURES)
    assert len(figures) == count
    for label, width, height, drawn in figures:
        assert width > 300, label
        assert height > 100, label
        assert drawn >= 2, label


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("name", ["full", "bare", "many", "compare"])
def test_nothing_is_wider_than_the_window(chromium, pages, name, width):
    script = look(chromium, pages[name], width)
    assert script("return innerWidth") == width
    assert script("return document.documentElement.scrollWidth") <= width


def test_text_in_a_figure_can_be_read_on_a_telephone(chromium, pages):
    script = look(chromium, pages["full"], 400)
    heights = script(
        "return [...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["full", "bare", "compare"])
def test_all_text_has_contrast(chromium, pages, name, scheme):
    script = look(chromium, pages[name], scheme=scheme)
    page = script("return getComputedStyle(document.body).backgroundColor")
    assert (max(int(c) for c in page[4:-1].split(",")) < 50) == (scheme == "dark")
    contrasts = script(CONTRASTS)
    assert len(contrasts) > 20
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []


def test_names_do_not_act_and_nothing_is_fetched(chromium, pages):
    script = look(chromium, pages["bare"])
    assert chromium.title == NAME
    fetched = script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in fetched if not name.startswith("data:")] == []
