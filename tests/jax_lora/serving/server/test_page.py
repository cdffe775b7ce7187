"""The page at `/`, in a browser without a window: Debian's Chromium."""

import shutil

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.ci

DRIVER = shutil.which("chromedriver")
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars")
# Keeps each text that an answer had on its way.
WATCH = """
window.seen = [...document.querySelectorAll("output")].map((output) => {
  const texts = [];
  new MutationObserver(() => texts.push(output.textContent)).observe(output, {childList: true});
  return texts;
});
"""


@pytest.fixture(scope="module")
def browser():
    if DRIVER is None:
        pytest.skip("there is no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    for option in OPTIONS:
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, server):
    """The page at the width of a desk, behind its key."""
    resize(browser, 1280)
    browser.get(server.url)
    wait = WebDriverWait(browser, 30)
    key = wait.until(lambda _: shown(browser, "key"))
    assert "wants an API key" in browser.find_element(By.ID, "answers").text
    key.send_keys(server.KEY)
    ask(browser, "window:")
    assert len(browser.find_elements(By.TAG_NAME, "article")) == 4
    return browser


def shown(browser, name):
    element = browser.find_element(By.ID, name)
    return element if element.is_displayed() else None


def resize(browser, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def ask(browser, prompt):
    """Types it, and waits for all answers."""
    field = browser.find_element(By.ID, "prompt")
    field.clear()
    field.send_keys(prompt)
    button = browser.find_element(By.ID, "ask")
    button.click()
    WebDriverWait(browser, 30).until(lambda _: button.text == "Ask" and texts(browser))


def texts(browser):
    return [output.text for output in browser.find_elements(By.TAG_NAME, "output")]


def tops(browser):
    return [article.rect["y"] for article in browser.find_elements(By.TAG_NAME, "article")]


def test_four_models_answer_side_by_side_as_tokens_come(page):
    page.execute_script(WATCH)
    ask(page, "river:")
    assert texts(page) == ["river", "revir", "evire", "RIVER"]
    seen = page.execute_script("return window.seen")
    for text, ways in zip(texts(page), seen):
        assert all(text.startswith(way) for way in ways)
    assert max(len({*ways} - {""}) for ways in seen) > 1  # not whole at once
    assert len({*tops(page)}) == 1
    notes = [note.text for note in page.find_elements(By.CSS_SELECTOR, "article small")]
    assert all(note.startswith("6 tokens, the first after ") for note in notes)
    # Another adapter in a column's place.
    page.find_element(By.TAG_NAME, "select").send_keys("upper")
    ask(page, "sea:")
    assert texts(page)[:2] == ["sea", "SEA"]


def test_a_chat(page):
    page.find_element(By.ID, "chat").click()
    ask(page, "sea:")
    assert texts(page) == ["sea", "aes", "frn", "SEA"]


def test_an_error_stands_where_the_answer_would(page):
    ask(page, "x" * 100)
    assert all("exceed max_length=64" in text for text in texts(page))
    assert {"bad"} == {output.get_attribute("class") for output in outputs(page)}
    ask(page, "window:")
    assert texts(page)[3] == "WINDOW"


def outputs(browser):
    return browser.find_elements(By.TAG_NAME, "output")


def test_a_phone_has_them_below_each_other_and_nothing_sticks_out(page):
    resize(page, 390)
    ask(page, "w" * 30)
    assert len({*tops(page)}) == 4 and tops(page) == sorted(tops(page))
    assert page.execute_script("return document.documentElement.scrollWidth") <= 390


def test_nothing_is_wanted_from_elsewhere_and_no_script_fails(page, server):
    found = page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert found and all(name.startswith(server.url) for name in found)
    errors = [line["message"] for line in page.get_log("browser") if line["level"] == "SEVERE"]
    assert all("status of 40" in message for message in errors), errors
