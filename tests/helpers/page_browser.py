"""The browser in which tests open the page of a report; `conftest` makes one for all of them."""

import os
import shutil
from urllib.parse import quote

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

REQUIRED = os.environ.get("RMTJAX_REQUIRE_BROWSER") == "1"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
PATIENCE = 120  # seconds, after which something is wrong on the busiest machine


@pytest.fixture(scope="session")
def driver():
    """One browser for all tests; skips, or fails where it is required, without one."""
    if not (CHROMIUM and DRIVER):
        missing = "needs `chromium` and `chromedriver`: apt-get install chromium chromium-driver"
        (pytest.fail if REQUIRED else pytest.skip)(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    # No sandbox, which root may not have; no shared memory, of which containers have little.
    for switch in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the driver's path, Selenium does not search the net for one.
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    # On a busy machine a page of 3,000 kernels can take longer than the 30 seconds of Selenium.
    browser.set_script_timeout(PATIENCE)
    yield browser
    browser.quit()


class Page:
    """Does what a reader does, and returns what a reader sees."""

    def __init__(self, driver, path):
        self.driver, self.url = driver, f"file://{quote(str(path))}"
        self.resize(1400)

    def resize(self, width):
        """Loads the page anew at a width; one under 500 is that of a phone."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        self.driver.get(self.url)

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def run(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def column(self, number):
        """Returns the cells of a column, from 1, in the order shown."""
        cells = f"[...document.querySelectorAll('tbody .opens > :nth-child({number})')]"
        return self.run(f"{cells}.map(cell => cell.textContent)")

    def sort(self, number):
        """Clicks on the head of a column, and returns the order that it shows."""
        head = self.one(f"thead th:nth-child({number})")
        head.find_element(By.TAG_NAME, "button").click()
        return head.get_attribute("aria-sort")

    def search(self, text):
        """Replaces the text of the search field."""
        self.one("#name").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)

    def wait(self, script):
        """Waits until a script returns something that is true, and returns it."""
        return WebDriverWait(self.driver, PATIENCE).until(lambda _: self.run(script))

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)

    def close_all(self):
        """Closes the pictures that are open, such as the one that a page opens with."""
        for opener in self.all("[aria-expanded=true]"):
            opener.click()

    def open(self, number=1):
        """Opens the picture of a kernel alone, from 1, and returns its words and numbers."""
        self.close_all()
        self.one(f"tbody .opens:nth-child({number}) button").click()
        return self.one(".detail").text


@pytest.fixture
def show(driver, tmp_path):
    """Writes a report and opens it. At the end of the test the console must be empty."""

    def write_and_open(report, title="a title", *columns):
        (tmp_path / "page.html").write_text(report.to_page(title, *columns))
        return Page(driver, tmp_path / "page.html")

    yield write_and_open
    assert driver.get_log("browser") == []
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
