"""The report page in a real browser: search, sort, neurons, phone, dark, and nothing amiss.

Needs Chromium and its driver (Debian: chromium, chromium-driver) and the extra `browser`.
"""

import json
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import polars as pl
import pytest

from .conftest import World, steerrec

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="no chromium and chromedriver on this machine"
)
_FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--disable-dev-shm-usage",
)
HOSTILE = "<img src=x onerror=document.title='owned'><script>document.title='owned'</script>"


@pytest.fixture(scope="module")
def page(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the small world, in which two titles are hostile."""
    folder = tmp_path_factory.mktemp("report")
    artifact, model = folder / "artifact", folder / "model"
    shutil.copytree(world.artifact, artifact)
    shutil.copytree(world.model, model)
    items = pl.read_parquet(model / "items.parquet")
    titles = items["title"].to_list()
    titles[:2] = [HOSTILE, "\u202eright to left " + "long " * 2000]
    items.with_columns(pl.Series("title", titles)).write_parquet(model / "items.parquet")
    made = steerrec(
        *("report", artifact, "--model", model, "--data", world.data),
        *("-o", folder / "report.html", "--users", 4),
    )
    assert made.code == 0, made.err
    return folder / "report.html"


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in _FLAGS:
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # the path of the driver is given, so that selenium asks nobody for one
    with webdriver.Chrome(options=options, service=Service(DRIVER)) as driver:
        driver.set_script_timeout(120)
        driver.set_page_load_timeout(120)
        yield driver


@pytest.fixture
def browser(driver: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """The page opened from disk; whatever a test does, the console stays empty."""
    size(driver, 1280)
    driver.get("about:blank")  # a hash that stays would choose a neuron
    driver.get(page.as_uri())
    yield driver
    assert driver.get_log("browser") == []


def size(driver: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # a click hits what has arrived
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def neurons(browser: webdriver.Chrome) -> list[int]:
    lines = browser.find_elements(By.CSS_SELECTOR, "#neurons-table tbody tr")
    return [int(line.get_attribute("data-neuron") or -1) for line in lines]


def find(browser: webdriver.Chrome, text: str) -> list[int]:
    """What is listed once the search for a text is through."""
    box = browser.find_element(By.ID, "search")
    box.clear()
    box.send_keys(text + Keys.END)
    pause = "const done = arguments[0]; setTimeout(done, 300)"
    browser.execute_async_script(pause)
    return neurons(browser)


def everything(browser: webdriver.Chrome) -> dict[int, list[object]]:
    """All neurons of the page, and all of them listed."""
    Select(browser.find_element(By.ID, "live")).select_by_value("0")
    text = browser.find_element(By.ID, "payload").get_attribute("textContent")
    return {row[0]: row for row in json.loads(text or "")["rows"]}


def test_search_finds_numbers_and_labels(browser: webdriver.Chrome) -> None:
    rows = everything(browser)
    assert len(rows) == 64
    assert find(browser, "17")[0] == 17
    label = next(str(row[1]) for row in rows.values() if row[3])
    assert set(find(browser, label)) >= {n for n, row in rows.items() if row[1] == label}
    assert find(browser, "no such thing") == []
    assert "0 of 64" in browser.find_element(By.ID, "found").text


def test_columns_sort_both_ways(browser: webdriver.Chrome) -> None:
    rows = everything(browser)

    def header(place: int) -> str:
        return f"#neurons-table th:nth-child({place}) button"

    browser.find_element(By.CSS_SELECTOR, header(4)).click()  # how often they fire
    rates = [rows[n][3] for n in neurons(browser)]
    assert rates == sorted(rates, reverse=True)
    browser.find_element(By.CSS_SELECTOR, header(4)).click()
    rates = [rows[n][3] for n in neurons(browser)]
    assert rates == sorted(rates)
    sorts = browser.find_elements(By.CSS_SELECTOR, "#neurons-table th[aria-sort]")
    assert [each.get_attribute("aria-sort") for each in sorts] == ["ascending"]
    assert browser.switch_to.active_element.text == "fires"  # the keyboard is where it was


def test_more_are_shown_when_asked(browser: webdriver.Chrome) -> None:
    everything(browser)
    assert len(neurons(browser)) == 50
    browser.find_element(By.ID, "more").click()
    assert len(neurons(browser)) == 64
    assert not browser.find_element(By.ID, "more").is_displayed()


def test_links_lead_from_neuron_to_neuron_and_back(browser: webdriver.Chrome) -> None:
    def shown() -> str:
        return browser.find_element(By.CSS_SELECTOR, "#detail h3").text

    first = neurons(browser)[1]
    browser.find_element(By.CSS_SELECTOR, "#neurons-table tbody tr:nth-child(2) a").click()
    WebDriverWait(browser, 20).until(lambda _: shown().startswith(f"Neuron {first}:"))
    assert browser.switch_to.active_element.get_attribute("id") == "detail"
    links = browser.find_elements(By.CSS_SELECTOR, "#detail a[href^='#neuron-']")
    like = links[0].text
    links[0].click()
    WebDriverWait(browser, 20).until(lambda _: shown().startswith(f"Neuron {like}:"))
    browser.back()
    WebDriverWait(browser, 20).until(lambda _: shown().startswith(f"Neuron {first}:"))
    assert browser.find_elements(By.CSS_SELECTOR, "#detail svg[role=img]")


def test_a_users_neuron_leads_to_its_details(browser: webdriver.Chrome) -> None:
    link = browser.find_element(By.CSS_SELECTOR, "#users a[href^='#neuron-']")
    number = link.text
    link.click()
    WebDriverWait(browser, 20).until(
        lambda _: browser.find_element(By.CSS_SELECTOR, "#detail h3").text.startswith(
            f"Neuron {number}:"
        )
    )


def test_hostile_titles_are_shown_and_do_nothing(browser: webdriver.Chrome) -> None:
    everything(browser)
    for line in range(1, 51):
        browser.find_element(By.CSS_SELECTOR, f"#neurons-table tr:nth-child({line}) a").click()
        if HOSTILE[:20] in browser.find_element(By.ID, "detail").text:
            break
    assert HOSTILE[:20] in browser.find_element(By.ID, "detail").text
    assert "owned" not in browser.title
    assert not browser.find_elements(By.TAG_NAME, "img")


def test_colours_can_be_switched(browser: webdriver.Chrome) -> None:
    def paper() -> str:
        return str(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))

    light = paper()
    browser.find_element(By.ID, "theme").click()
    dark = paper()
    assert dark != light
    size(browser, 1280, "dark")
    browser.refresh()
    assert paper() == dark  # what the system asks for
    browser.find_element(By.ID, "theme").click()
    assert paper() == light


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_scrolls_sideways(browser: webdriver.Chrome, width: int) -> None:
    size(browser, width)
    browser.refresh()
    wide = browser.execute_script("return document.documentElement.scrollWidth")
    assert wide <= width


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.skipif(not find_spec("axe_core_python"), reason="axe-core-python is not installed")
def test_the_accessibility_checker_finds_nothing(
    browser: webdriver.Chrome, width: int, scheme: str
) -> None:
    import axe_core_python

    size(browser, width, scheme)
    browser.refresh()
    for details in browser.find_elements(By.CSS_SELECTOR, "details:not([open])"):
        browser.execute_script("arguments[0].open = true", details)
    axe = Path(axe_core_python.__file__).with_name("axe.min.js").read_text(encoding="utf-8")
    browser.execute_script(axe)
    found = browser.execute_async_script(
        "const done = arguments[0]; axe.run().then((result) => done(result.violations))"
    )
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


def test_on_paper_every_user_is_there(browser: webdriver.Chrome) -> None:
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert not browser.find_elements(By.CSS_SELECTOR, "details.user:not([open])")
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert len(browser.find_elements(By.CSS_SELECTOR, "details.user:not([open])")) == 3
