"""The operator's page in a real browser."""

import shutil
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from phonon import ConflictFreeUpdate, Process, RetryPolicy
from support.page import TOKEN, Page
from support.world import Make, Redis, wait_until

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(120)]

#: What somebody may store, and a page must not run.
EVIL = "<img src=x onerror=\"document.title='broken'\">"


class Doomed(ConflictFreeUpdate):
    """Fails until it is told not to."""

    cured = False

    def execute(self) -> None:
        if not Doomed.cured:
            raise OSError("no database")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    driver = shutil.which("chromedriver")
    assert driver, "install chromium and chromium-driver, as .ci/run does"
    options = webdriver.ChromeOptions()
    for argument in (
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--window-size=1200,900", "--disable-background-networking"),
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(server: Redis, namespace: str) -> Iterator[Page]:
    Doomed.cured = False
    with Page(server.url, namespace, "--token", TOKEN) as page:
        yield page
    Doomed.cured = True


def park(process: Process, record: str) -> None:
    with pytest.raises(OSError, match="no database"):
        Doomed(process, record, doc={EVIL: 1}).end_session()


def text_of(browser: Any) -> str:
    return str(browser.execute_script("return document.body.innerText"))


def click(browser: Any, label: str, within: str = "main") -> None:
    """Click a button, which may be replaced by a fresh one at any moment."""
    script = (
        "const found = [...document.querySelectorAll(arguments[0] + ' button')]"
        ".find((b) => b.textContent === arguments[1]); if (found) found.click(); return !!found;"
    )
    wait_until(lambda: browser.execute_script(script, within, label))


def test_somebody_finds_a_dead_letter_and_replays_it(
    browser: Any, page: Page, make: Make, namespace: str
) -> None:
    process = make(retry=RetryPolicy(attempts=1), heartbeat_interval=0.2)
    park(process, "a")
    browser.get(page.url)
    wait_until(lambda: "1 batch is parked" in text_of(browser))
    assert namespace in text_of(browser)
    assert browser.find_element(By.ID, "parked-badge").text == "1"
    link = browser.find_element(By.LINK_TEXT, "1 batch is parked")
    assert str(link.get_attribute("href")).endswith("#batches")
    browser.find_element(By.TAG_NAME, "body").send_keys("2")
    wait_until(lambda: "no database" in text_of(browser))
    click(browser, "test.test.a")
    wait_until(lambda: "onerror" in browser.find_element(By.ID, "dialog").text)
    assert "broken" not in browser.title, "what is stored is never read as HTML"
    browser.switch_to.active_element.send_keys(Keys.ESCAPE)
    wait_until(lambda: not browser.find_element(By.ID, "dialog").is_displayed())
    Doomed.cured = True
    click(browser, "Replay")
    wait_until(lambda: browser.find_element(By.ID, "token").is_displayed())
    browser.find_element(By.ID, "token").send_keys(TOKEN)
    click(browser, "Replay", "dialog")
    wait_until(lambda: "goes on as" in text_of(browser))
    wait_until(lambda: "No batch runs" in text_of(browser))
    assert process.parked() == []
    browser.find_element(By.TAG_NAME, "body").send_keys("6")
    wait_until(lambda: "replay" in browser.find_element(By.TAG_NAME, "main").text)


def test_a_wrong_token_changes_nothing(browser: Any, page: Page, make: Make) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    park(process, "a")
    browser.get(f"{page.url}#batches")
    browser.execute_script("sessionStorage.clear()")
    click(browser, "Discard")
    wait_until(lambda: browser.find_element(By.ID, "token").is_displayed())
    browser.find_element(By.ID, "token").send_keys("wrong")
    click(browser, "Discard", "dialog")
    wait_until(lambda: "the token is not the one" in text_of(browser))
    assert len(process.parked()) == 1


def test_a_queue_is_shown_and_a_lock_is_broken(browser: Any, page: Page, make: Make) -> None:
    holder, waiter = make(), make()
    holder.lock("reports").acquire()
    waiting = threading.Thread(target=waiter.lock("reports").acquire, daemon=True)
    waiting.start()
    browser.get(f"{page.url}#locks")
    wait_until(lambda: f"{waiter.id[:8]}" in text_of(browser))
    browser.execute_script("sessionStorage.setItem('token', arguments[0])", TOKEN)
    click(browser, "Break")
    click(browser, "Break", "dialog")
    wait_until(lambda: "is released" in text_of(browser))
    waiting.join(20)
    assert not waiting.is_alive()


def test_it_is_live_and_says_when_the_server_is_gone(browser: Any, own_server: Redis) -> None:
    with Page(own_server.url, "phonon", "--timeout", "0.5") as page:
        browser.get(page.url)
        wait_until(lambda: "no process runs" in text_of(browser))
        with Process(url=own_server.url) as process:
            wait_until(lambda: process.id[:8] in text_of(browser))
        own_server.kill()
        status = browser.find_element(By.ID, "status")
        wait_until(lambda: "does not answer" in status.text)
        assert status.get_attribute("class") == "bad"


def test_on_a_phone_nothing_is_cut_off(browser: Any, page: Page, make: Make) -> None:
    process = make(retry=RetryPolicy(attempts=1))
    park(process, "a" * 100)
    metrics = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        for view in ("overview", "batches", "locks", "sessions", "doctor", "log"):
            browser.get("about:blank")  # or only the fragment would change
            browser.get(f"{page.url}#{view}")
            wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "main > *"))
            width = browser.execute_script("return document.documentElement.scrollWidth")
            assert width <= 390, view
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_dark_is_dark(browser: Any, page: Page) -> None:
    colours = {}
    script = "return getComputedStyle(document.body).backgroundColor"
    for scheme in ("light", "dark"):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(page.url)
        colours[scheme] = browser.execute_script(script)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert colours == {"light": "rgb(247, 248, 250)", "dark": "rgb(17, 20, 26)"}


def test_the_browser_complains_about_nothing_and_asks_nobody_else(
    browser: Any, page: Page, make: Make
) -> None:
    make()
    browser.get_log("browser")
    browser.get_log("performance")
    for view in ("overview", "batches", "locks", "sessions", "doctor", "log"):
        browser.get(f"{page.url}#{view}")
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "main > *"))
    assert browser.get_log("browser") == []
    entries = "".join(entry["message"] for entry in browser.get_log("performance"))
    asked = {part.split("/")[0] for part in entries.split('"url":"http://')[1:]}
    assert asked == {page.url.split("/")[2]}
