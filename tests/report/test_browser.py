"""The report in a headless Chromium: at two widths, light and dark, by keyboard, without scripts, and printed."""

import base64
import re
import shutil

import pytest
import samples
from samples import HOSTILE

from simsid.report import write_film

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("no Chromium with chromedriver (Debian: chromium and chromium-driver)", allow_module_level=True)
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (pip install 'simsid[test]')")

KEYS = webdriver.Keys
OPTIONS = [
    "headless",
    "no-sandbox",  # as root, as in a container, Chromium does not start with it
    "disable-gpu",
    "disable-quic",  # this and the following keep it off the network
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
]
ORDER = "return [...document.querySelectorAll('#films tbody tr:not([hidden])')].map(row => row.cells[%d]?.textContent)"

LOW_CONTRAST = """
// Text whose contrast with its background is below 4.5 (WCAG 2.1, 1.4.3), as [text, contrast].
const parse = (color) => color.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
const background = (node) => {
  for (; node; node = node.parentElement) {
    const color = parse(getComputedStyle(node).backgroundColor);
    if (color.length === 3 || color[3] > 0) return color;
  }
};
const low = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const text = walker.currentNode.data.trim(), parent = walker.currentNode.parentElement;
  if (!text || parent.closest("script, [hidden]")) continue;
  const [a, b] = [parse(getComputedStyle(parent).color), background(parent)].map(luminance);
  const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (contrast < 4.5) low.push([text, contrast]);
}
return low;
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    rows, examples = samples.rows(60, pages=2), samples.examples()
    for row, example in zip(rows[:2], examples):
        write_film(folder / "report.html", row, example, descriptions={"residual": "mean squared difference"})
    evaluation = samples.evaluation(in_sample=True, names=["residual"])
    parts = {"examples": examples, "rows": rows, "warnings": [HOSTILE], "memory": samples.memory()}
    samples.write(folder / "report.html", evaluation=evaluation, **parts)
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for name in OPTIONS:
        options.add_argument(f"--{name}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def show(browser, path, width=1280, scheme="light", media=""):
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(path.as_uri())


def tab_to(browser, text):
    """Press Tab until the focused element shows a text; returns it."""
    for _ in range(40):
        webdriver.ActionChains(browser).send_keys(KEYS.TAB).perform()
        if text in browser.execute_script("const e = document.activeElement; return [e.innerText.trim(), e.id]"):
            return browser.switch_to.active_element
    raise AssertionError(f"Tab does not reach {text!r}")


def column(browser, index):
    return browser.execute_script(ORDER % index)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("page", ["report.html", samples.rows(pages=1)[0].page], ids=["report", "film"])
def test_page_fits_and_is_legible(browser, folder, page, width, scheme):
    show(browser, folder / page, width, scheme)
    assert browser.execute_script("return innerWidth") == width
    sizes = browser.execute_script("const root = document.documentElement; return [root.scrollWidth, root.clientWidth]")
    assert sizes[0] == sizes[1], "the page scrolls sideways"
    assert browser.execute_script(LOW_CONTRAST) == []
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth > 0)")
    dark = browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(20, 24, 29)"
    assert dark == (scheme == "dark")
    assert browser.get_log("browser") == []  # a violation of the content security policy would be here


def test_page_requests_nothing(browser, folder):
    show(browser, folder / "report.html")
    requested = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert all(name.startswith("data:") for name in requested)


def test_policy_stops_a_script_that_escaping_missed(browser, folder):
    text = (folder / "report.html").read_text("utf-8")
    page = folder / "attacked.html"
    attack = "<script>document.title = 'attacked'</script><img src=x onerror=\"document.title = 'attacked'\">"
    page.write_text(text.replace("<footer>", f"{attack}<footer>"), "utf-8")
    show(browser, page)
    assert browser.title.startswith("Report ")
    assert column(browser, 0) and "Content Security Policy" in str(browser.get_log("browser"))


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_enter_on_a_header_sorts_and_enter_again_reverses(browser, folder, width, scheme):
    show(browser, folder / "report.html", width, scheme)
    expected = sorted(row.score for row in samples.rows(60) if row.score is not None)
    assert [float(text) for text in column(browser, 1)[:-1]] == expected[::-1]
    button = tab_to(browser, "Score")
    head = button.find_element("xpath", "..")
    for state, scores in (("ascending", expected), ("descending", expected[::-1])):
        button.send_keys(KEYS.ENTER)
        assert head.get_attribute("aria-sort") == state
        assert [float(text) for text in column(browser, 1)[:-1]] == scores
        assert "not scored" in column(browser, 1)[-1]
    button = tab_to(browser, "Finding")
    button.send_keys(KEYS.ENTER)
    assert head.get_attribute("aria-sort") is None
    findings = column(browser, 4)
    assert findings[0] == HOSTILE and findings[1] == "effusion" and not findings[-1]


def test_names_sort_by_their_numbers(browser, folder):
    show(browser, folder / "report.html")
    tab_to(browser, "Image").send_keys(KEYS.ENTER)
    names = [name for name in column(browser, 0) if re.fullmatch(r"\d+\.png", name)]
    assert names == [f"{i}.png" for i in range(1, 60)]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_typing_filters_and_space_shows_only_flagged(browser, folder, width, scheme):
    show(browser, folder / "report.html", width, scheme)
    rows = samples.rows(60)
    tab_to(browser, "filter").send_keys("EFFUSION abnormal")
    expected = {row.path.split("/", 1)[1] for row in rows if row.finding == "effusion" and row.label == 1}
    assert len(expected) == 9 and set(column(browser, 0)) == expected
    assert browser.find_element("id", "count").text == "9 of 60 images"
    tab_to(browser, "flagged").send_keys(KEYS.SPACE)
    assert set(column(browser, 3)) == {"yes"}
    browser.find_element("id", "filter").send_keys(KEYS.CONTROL, "a", KEYS.DELETE)
    assert len(column(browser, 3)) == sum(bool(row.flagged) for row in rows)


def test_long_table_shows_500_rows_until_all_are_wanted(browser, tmp_path):
    samples.write(tmp_path / "long.html", rows=samples.rows(5000))
    show(browser, tmp_path / "long.html")
    count = browser.find_element("id", "count")
    assert len(column(browser, 0)) == 500 and count.text == "5000 of 5000 images, the first 500 shown"
    tab_to(browser, "Score").send_keys(KEYS.ENTER)
    lowest = min(row.score for row in samples.rows(5000) if row.score is not None)
    assert len(column(browser, 1)) == 500 and float(column(browser, 1)[0]) == lowest
    browser.find_element("id", "filter").send_keys("4998.png")
    assert column(browser, 0) == ["4998.png"] and count.text == "1 of 5000 images"
    browser.find_element("id", "filter").send_keys(KEYS.CONTROL, "a", KEYS.DELETE)
    tab_to(browser, "more").send_keys(KEYS.ENTER)
    assert len(column(browser, 0)) == 5000 and count.text == "5000 of 5000 images"


def test_name_opens_the_page_of_its_image_and_leads_back(browser, folder):
    show(browser, folder / "report.html")
    tab_to(browser, "1.png").send_keys(KEYS.ENTER)
    assert browser.title == "1.png" and browser.current_url == (folder / samples.rows(pages=2)[1].page).as_uri()
    tab_to(browser, "← report").send_keys(KEYS.ENTER)
    assert browser.current_url == (folder / "report.html").as_uri()


def test_page_without_scripts_shows_the_whole_table(browser, folder):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        show(browser, folder / "report.html")
        assert not browser.find_element("id", "filter").is_displayed()
        table = browser.find_element("id", "films")
        assert not table.find_elements("tag name", "button")
        assert len(table.find_elements("css selector", "tbody tr")) == 60
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_print_shows_every_row_and_no_controls(browser, folder):
    show(browser, folder / "report.html", width=700, scheme="dark", media="print")
    assert not browser.find_element("id", "filter").is_displayed()
    assert browser.find_element("id", "count").is_displayed(), "a printed table may lack rows"
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    clipped = "return [...document.querySelectorAll('.wide')].filter(box => box.scrollHeight > box.clientHeight).length"
    assert browser.execute_script(clipped) == 0
    assert browser.execute_script(LOW_CONTRAST) == []
    pdf = base64.b64decode(browser.print_page())
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 4
