"""The page of a report, in a real browser, without its window."""

import functools
import os
import shutil
from urllib.parse import quote

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

import rmtjax
from rmtjax import _cost

REQUIRED = os.environ.get("RMTJAX_REQUIRE_BROWSER") == "1"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "<svg onload=window.hit=1>",
    "{{rows}}",
    "&lt;b&gt;",
    "\u202e\u2028\u2029\x00",
    "l\u00e4nge \u5c64 \U0001f600",
    "x" * 3000,
    "",
]


@pytest.fixture(scope="module")
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
    # With the driver's path, nothing is looked for in the net.
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield browser
    browser.quit()


class Page:
    """What a reader sees and does."""

    def __init__(self, driver, path):
        self.driver, self.url = driver, f"file://{quote(str(path))}"
        self.resize(1400)

    def resize(self, width):
        """A fresh page at a width; a phone's is that of a phone."""
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
        """The cells of a column, from 1, in the order shown."""
        cells = f"[...document.querySelectorAll('tbody .opens > :nth-child({number})')]"
        return self.run(f"{cells}.map(cell => cell.textContent)")

    def sort(self, number):
        """Clicks on the head of a column; what it then says of the order."""
        head = self.one(f"thead th:nth-child({number})")
        head.find_element(By.TAG_NAME, "button").click()
        return head.get_attribute("aria-sort")

    def search(self, text):
        """Types a part of a name, in the place of what is there."""
        self.one("#name").send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE, text)

    def press(self, *keys):
        self.driver.switch_to.active_element.send_keys(*keys)


@pytest.fixture
def show(driver, tmp_path):
    """Writes a report and opens it; in the end the console must be empty."""

    def write_and_open(report, title="a title"):
        (tmp_path / "page.html").write_text(report.to_page(title))
        return Page(driver, tmp_path / "page.html")

    yield write_and_open
    assert driver.get_log("browser") == []
    driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@functools.cache
def measured():
    """Kernels of all verdicts, timed by a clock that says a millisecond, and a quarter thin."""
    noise = np.random.default_rng(1).normal(size=(4, 100, 120)).astype(np.float32)
    spiked = lambda k: noise[k] * np.where(np.arange(100) < k, 3, 1)[:, None]
    kernels = {
        "Dense_2": spiked(3),
        "Dense_10": noise[0],
        "stack": np.stack([spiked(k) for k in range(4)]),
        "nan": np.full((100, 120), np.nan),
        "short": noise[0, :, :10],
        "truncated": noise[0, :, :40] @ noise[1, :40],
    }
    params = {name: {"kernel": np.float32(kernel)} for name, kernel in kernels.items()}
    axes = {f"{name}/kernel": rmtjax.KernelAxes((0,), (1,)) for name in kernels}
    axes["stack/kernel"] = rmtjax.KernelAxes((1,), (2,), (0,))
    clock = lambda product: np.asarray([[1.0 if r is None else 0.25 for r in product.ranks]] * 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cost, "time_products", clock)
        return rmtjax.analyze(params, axes=axes, batch=8)


def few(*names):
    return rmtjax.Report(
        rmtjax.Plan({f"{name}/kernel": measured().plan[f"{name}/kernel"] for name in names})
    )


THREE = "Dense_10", "Dense_2", "nan"


@functools.cache
def many(count=3000):
    rows = [measured().plan[f"{name}/kernel"] for name in THREE]
    return rmtjax.Report(rmtjax.Plan({f"layers_{i}/kernel": rows[i % 3] for i in range(count)}))


def test_a_page_tells_totals_and_kernels(show):
    page = show(measured(), "<i>rmtjax</i> &amp; {{data}}")
    assert page.driver.title == page.one("h1").text == "<i>rmtjax</i> &amp; {{data}}"
    totals = [entry.text.split("\n") for entry in page.all(".totals div")]
    assert totals == [
        ["kernels", "6 2 factorized, 4 kept"],
        ["parameters", "97,000 \u2192 40,300 \u221258.5%"],
        ["multiply-adds", "776,000 \u2192 322,400 \u221258.5%"],
        ["milliseconds", "9 \u2192 5.25 \u221241.7%"],
    ]
    assert page.column(1) == [row.path for row in measured().rows]
    assert page.column(2)[:2] == ["kept", "factorized"]
    assert page.column(3)[:2] == [
        "no signal stands out of the noise",
        "3 of 100 are signal, rank 3",
    ]
    assert page.column(8)[1] == "12,000 \u2192\u00a0660"
    assert page.one("#found").text == "6 of 6 kernels"


def test_columns_are_sorted_up_and_down_and_back(show):
    page = show(measured())
    tree = page.column(1)
    assert page.sort(1) == "ascending"
    assert page.column(1) == [
        f"{name}/kernel" for name in ("Dense_2", "Dense_10", "nan", "short", "stack", "truncated")
    ]
    assert page.sort(5) == "ascending"
    assert len(page.all("[aria-sort]")) == 1
    numbers = page.column(5)
    assert numbers[-2:] == ["-", "-"]
    assert numbers[:-2] == sorted(numbers[:-2], key=int)
    assert page.sort(5) == "descending"
    assert page.column(5) == [*numbers[-3::-1], "-", "-"]
    assert page.sort(5) is None
    assert page.column(1) == tree
    page.sort(8)  # by what is, not by what is planned
    assert page.column(8)[0] == "1,000"
    assert page.column(8)[-1].startswith("48,000")


def test_kernels_are_filtered_by_name_and_verdict(show):
    page = show(measured())
    page.search("DENSE")
    assert page.column(1) == ["Dense_10/kernel", "Dense_2/kernel"]
    assert page.one("#found").text == "2 of 6 kernels"
    verdict = Select(page.one("#verdict"))
    assert [option.text for option in verdict.options] == ["all", "factorized", "kept"]
    verdict.select_by_visible_text("factorized")
    assert page.column(1) == ["Dense_2/kernel"]
    page.search("<nothing>")
    assert page.column(1) == []
    assert page.one("#found").text == "0 of 6 kernels"
    page.search("")
    assert page.column(1) == ["Dense_2/kernel", "stack/kernel"]


def test_the_keyboard_sorts_filters_and_opens(show):
    page = show(few(*THREE))
    for _ in range(3):
        page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "kernel"
    page.press(Keys.ENTER)
    assert page.column(1) == ["Dense_2/kernel", "Dense_10/kernel", "nan/kernel"]
    for _ in page.all("thead th"):
        page.press(Keys.TAB)
    opener = page.driver.switch_to.active_element
    assert opener.text == "Dense_2/kernel"
    assert opener.get_attribute("aria-expanded") == "false"
    for key in (Keys.ENTER, Keys.SPACE, Keys.SPACE):
        page.press(key)
        opened = opener.get_attribute("aria-expanded") == "true"
        assert opened == bool(page.all(".detail"))
        assert page.driver.switch_to.active_element == opener
    assert page.one(f"#{opener.get_attribute('aria-controls')} svg").is_displayed()
    outline = page.run("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.press(Keys.TAB)
    assert page.driver.switch_to.active_element.text == "Dense_10/kernel"


def opened(page, number=1):
    """The words and numbers of a kernel's picture."""
    page.one(f"tbody .opens:nth-child({number}) button").click()
    return page.one(".detail").text


def test_a_kernel_shows_its_spectrum_in_a_picture_and_in_words(show):
    page = show(few("Dense_2"))
    text = opened(page)
    assert "100 eigenvalues." in text
    assert "3 above the threshold." in text
    (row,) = few("Dense_2").rows
    for name in ("ratio", "variance", "edge", "threshold"):
        assert f"{name}\n{getattr(row, name):.4g}" in text
    picture = page.one(".detail svg")
    words = page.one(f"#{picture.get_attribute('aria-labelledby')}")
    assert picture.get_attribute("role") == "img"
    assert words.text in text
    drawn = page.run("document.querySelector('svg').outerHTML")
    assert "NaN" not in drawn
    assert "undefined" not in drawn
    # The law ends where the edge is, and there meets the axis.
    end = page.run("document.querySelector('.law').getAttribute('d').split('L').at(-1)")
    x, y = map(float, end.split())
    assert x == pytest.approx(float(page.one(".edge").get_attribute("x1")), abs=0.2)
    assert y == pytest.approx(float(page.one(".edge").get_attribute("y2")), abs=1)
    page.one(".opens td:last-child").click()  # anywhere on the row
    assert not page.all(".detail")


def test_what_cannot_be_drawn_says_so(show):
    page = show(few("nan", "short", "stack", "truncated"))
    for opener in page.all(".opens button"):
        opener.click()
    nan, short, stack, truncated = (detail.text for detail in page.all(".detail"))
    assert nan == short == "There is no spectrum to draw."
    assert "Matrix 4 of 4, that with most spikes: 100 eigenvalues." in stack
    assert "60 zeros are not drawn." in truncated
    assert "threshold." not in truncated
    assert len(page.all(".law")) == 1


def test_details_stay_with_their_kernels(show):
    page = show(few(*THREE))
    opened(page, 2)
    page.sort(1)
    assert page.run("document.querySelector('.detail').previousSibling.textContent").startswith(
        "Dense_2"
    )
    page.search("nan")
    assert not page.all(".detail")
    page.search("")
    assert len(page.all(".detail")) == 1


def test_three_thousand_kernels(show):
    page = show(many())
    assert page.run("document.documentElement.outerHTML.length") < 4e6
    assert len(page.column(1)) == 3000
    assert page.sort(5) == "ascending"
    assert page.sort(5) == "descending"
    assert page.column(5)[:1000] == ["3"] * 1000
    page.search("_2999")
    assert page.column(1) == ["layers_2999/kernel"]
    page.search("_2998")
    assert "3 above the threshold" in opened(page)
    page.resize(360)
    page.sort(1)
    assert page.column(1)[:3] == [f"layers_{i}/kernel" for i in range(3)]
    assert page.run("document.documentElement.scrollWidth") == 360


def test_names_are_no_markup(show):
    row = measured().plan["Dense_2/kernel"]
    names = [*HOSTILE, "reason"]
    plan = rmtjax.Plan(dict.fromkeys(names, row))
    plan["reason"] = row._replace(reason="<b>bold</b>", action="<i>odd</i>")
    page = show(rmtjax.Report(plan), HOSTILE[0])
    expected = [
        name if name.isprintable() else name.encode("unicode_escape").decode() for name in names
    ]
    expected[names.index("")] = "(no name)"
    assert page.column(1) == expected
    assert page.column(3)[-1] == "<b>bold</b>"
    assert page.column(2)[-1] == "<i>odd</i>"
    for number in (1, 2, 3):
        page.sort(number)
    page.search("<script>")
    assert page.column(1) == HOSTILE[:1]
    opened(page)
    Select(page.one("#verdict")).select_by_visible_text("<i>odd</i>")
    assert page.run("window.hit") is None
    assert len(page.all("script")) == 2
    assert not page.all("img, i, table svg[onload]")
    assert page.run("document.body.innerHTML.includes('undefined')") is False


@pytest.mark.parametrize(
    "make",
    [
        lambda: few(*THREE),
        measured,
        lambda: rmtjax.Report(rmtjax.Plan({"x" * 3000: measured().plan["nan/kernel"]})),
    ],
    ids=["three", "all", "long name"],
)
def test_a_phone_shows_all_of_it(show, make):
    page = show(make())
    page.resize(360)
    for opener in page.all(".opens button"):
        opener.click()
    assert page.run("document.documentElement.scrollWidth") == 360
    boxes = page.run(
        "[...document.querySelectorAll('tbody td, tbody th, button, input, svg')].map(node => {"
        "const box = node.getBoundingClientRect(); return [box.left, box.right, box.width] })"
    )
    assert all(0 <= left < right <= 360 and width for left, right, width in boxes)
    label = page.run(
        "getComputedStyle(document.querySelector('td:nth-child(6)'), '::before').content"
    )
    assert label == '"rank "'


def luminance(colour):
    channels = [int(n) / 255 for n in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot(linear, [0.2126, 0.7152, 0.0722])


def contrast(*colours):
    """WCAG 2.2's ratio: 4.5 is asked of text, 3 of lines and bars."""
    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_in_dark_and_in_light(show, scheme):
    page = show(few(*THREE))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    opened(page, 2)
    style = lambda name, of: page.run(f"getComputedStyle(document.querySelector('{of}')).{name}")
    paper, shade = style("backgroundColor", "body"), style("backgroundColor", ".detail")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    texts = (
        "h1",
        "small",
        "#found",
        "tbody th button",
        ".keep",
        ".factorize",
        ".numbers dt",
        ".legend",
    )
    assert (
        min(contrast(style("color", text), back) for text in texts for back in (paper, shade)) > 4.5
    )
    assert contrast(style("fill", "svg text"), shade) > 4.5
    assert contrast(style("fill", ".bars"), shade) > 3
    for line in (".law", ".threshold", ".spikes", ".axis"):
        assert contrast(style("stroke", line), shade) > 3
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_without_javascript_there_is_a_table(show):
    page = show(few(*THREE))
    setting = "Emulation.setScriptExecutionDisabled"
    page.driver.execute_cdp_cmd(setting, {"value": True})
    try:
        page.resize(1400)
        assert [head.text for head in page.all("tbody th")] == [f"{name}/kernel" for name in THREE]
        assert not page.all("button")
        assert not page.one(".controls").is_displayed()
        assert "need JavaScript" in page.one("main").text
    finally:
        page.driver.execute_cdp_cmd(setting, {"value": False})


def test_nothing_is_fetched_and_nothing_else_is_run(show):
    page = show(few(*THREE))
    assert page.run("performance.getEntriesByType('resource')") == []
    refused = page.driver.execute_async_script("""
        const [done] = arguments, refused = [];
        document.addEventListener("securitypolicyviolation", (event) => {
          refused.push(event.effectiveDirective);
          if (refused.length === 4) done(refused.sort());
        });
        fetch("http://127.0.0.1:9/").catch(() => {});
        new Image().src = "http://127.0.0.1:9/x.png";
        const script = document.createElement("script");
        script.textContent = "window.hit = 1";
        document.body.append(script);
        document.body.setAttribute("onclick", "window.hit = 1");
    """)
    assert refused == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert page.run("window.hit") is None
    page.driver.get_log("browser")  # it tells of the four


def test_a_printed_page_has_all_kernels(show):
    page = show(many(60))
    pdf = page.driver.print_page()
    assert len(pdf) > 10_000
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert not page.one(".controls").is_displayed()
    assert (
        page.run("getComputedStyle(document.querySelector('.opens')).contentVisibility")
        == "visible"
    )
    page.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
