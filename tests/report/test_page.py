"""The page of a report, in a real browser, without its window: what it tells, and is asked."""

import numpy as np
import pytest
from helpers.page_reports import few, many, measured, THREE
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select

import rmtjax


def test_a_page_tells_totals_and_kernels(show):
    page = show(measured(), "<i>rmtjax</i> &amp; {{data}}")
    assert page.driver.title == page.one("h1").text == "<i>rmtjax</i> &amp; {{data}}"
    totals = [entry.text.split("\n") for entry in page.all(".totals div")]
    assert totals == [
        ["kernels", "6 2 would be factorized, 4 kept"],
        ["parameters", "97,000 \u2192 40,300 \u221258.5%"],
        ["multiply-adds", "776,000 \u2192 322,400 \u221258.5%"],
        ["milliseconds", "9 \u2192 5.25 \u221241.7%"],
    ]
    assert page.column(1) == [row.path for row in measured().rows]
    assert page.column(2)[:2] == ["kept", "would be factorized"]
    assert page.column(3)[:2] == [
        "no signal stands out of the noise",
        "3 of 100 are signal, rank 3",
    ]
    assert page.column(9)[1] == "12,000 \u2192\u00a0660"
    assert page.one("#found").text == "6 of 6 rows"


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
    page.sort(9)  # by what is, not by what is planned
    assert page.column(9)[0] == "1,000"
    assert page.column(9)[-1].startswith("48,000")


def test_columns_are_chosen_by_group(show):
    page = show(few(*THREE), "a title", "summary", "tails")
    heads = lambda: [
        head.text.split("\n")[0] for head in page.all("thead th") if head.is_displayed()
    ]
    columns = Select(page.one("#columns"))
    titles = [option.text for option in columns.options]
    assert titles == ["as asked", "default", "summary", "tails", "cost"]
    assert heads()[:2] == ["kernel", "verdict"]
    assert {"stable_rank", "alpha", "hill_error"} < set(heads())
    columns.select_by_visible_text("summary")
    summary = ["kernel", "verdict", "reason", "shape", "spikes", "distance", "stable_rank", "alpha"]
    assert heads() == summary
    (head,) = [head for head in page.all("thead th") if head.text.startswith("stable_rank")]
    head.find_element("tag name", "button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    columns.select_by_visible_text("default")
    assert "stable_rank" not in heads()
    assert page.all("[aria-sort]") == []  # no order by a column that is not shown


def test_kernels_are_filtered_by_name_and_verdict(show):
    page = show(measured())
    page.search("DENSE")
    assert page.column(1) == ["Dense_10/kernel", "Dense_2/kernel"]
    assert page.one("#found").text == "2 of 6 rows"
    verdict = Select(page.one("#verdict"))
    assert [option.text for option in verdict.options] == ["all", "would be factorized", "kept"]
    verdict.select_by_visible_text("would be factorized")
    assert page.column(1) == ["Dense_2/kernel"]
    page.search("<nothing>")
    assert page.column(1) == []
    assert page.one("#found").text == "0 of 6 rows"
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
    assert page.all(".detail")  # that of the largest cut, which the page opens with
    page.press(Keys.ENTER)
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


def test_a_kernel_shows_its_spectrum_in_a_picture_and_in_words(show):
    page = show(few("Dense_2"))
    text = page.open()
    assert "100 eigenvalues." in text
    assert "3 above the threshold." in text
    (row,) = few("Dense_2").rows
    for name in ("ratio", "variance"):
        assert f"{name}\n{getattr(row, name):.4g}" in text
    for name in ("edge", "threshold"):  # also on the scale of the axis
        value = getattr(row, name)
        assert f"{name}\nλ {value:.4g}, √λ {value**0.5:.4g}" in text
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
    page.close_all()
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
    page.open(2)
    page.sort(1)
    assert page.run("document.querySelector('.detail').previousSibling.textContent").startswith(
        "Dense_2"
    )
    page.search("nan")
    assert not page.all(".detail")
    page.search("")
    assert len(page.all(".detail")) == 1


def test_a_page_opens_with_a_figure(show):
    opened = lambda page: [row.text for row in page.all("[aria-expanded=true]")]
    page = show(few(*THREE))
    assert opened(page) == ["Dense_2/kernel"]  # the only cut, and not the first spectrum
    assert "3 above the threshold" in page.one(".detail").text
    assert page.one(".detail svg").is_displayed()
    assert page.driver.switch_to.active_element.tag_name == "body"
    assert page.run("scrollY") == 0
    page.one(".opens:nth-child(2) button").click()
    assert not page.all(".detail")
    assert opened(show(few("nan", "truncated", "Dense_10"))) == ["Dense_10/kernel"]
    assert opened(show(few("nan", "short"))) == []


def test_no_bar_of_noise_crosses_the_threshold(show):
    page = show(few("Dense_10"))
    (cut,) = (float(line.get_attribute("x1")) for line in page.all(".threshold"))
    bars = page.run("document.querySelector('.bars').getAttribute('d').slice(1).split('M')")
    ends = [(float(bar.split(" ")[0]), float(bar.split("H")[1].split("V")[0])) for bar in bars]
    heights = [
        float(bar.split("V")[2].removesuffix("Z")) - float(bar.split("V")[1].split("H")[0])
        for bar in bars
    ]
    # Coordinates have one decimal, and the threshold four digits.
    assert min(abs(right - cut) for _, right in ends) <= 0.3
    assert all(
        height == 0 for (left, _), height in zip(ends, heights, strict=True) if left > cut - 1
    )
    assert (
        max(right for (_, right), height in zip(ends, heights, strict=True) if height) < cut + 0.3
    )


def test_multiply_adds_of_a_convolution_are_of_one_position(show):
    kernel = np.random.default_rng(0).normal(size=(3, 3, 8, 60)).astype(np.float32)
    params = {"conv1": {"kernel": kernel}, "fc": {"kernel": kernel.reshape(72, 60)}}
    page = show(rmtjax.analyze(params | {"token": kernel[0, 0]}))
    assert page.column(10) == ["4,320 of\u00a0one\u00a0position", "4,320", "480"]
    heads = [head.text for head in page.all(".totals dt")]
    assert heads == ["kernels", "tensors under other names", "parameters"]
    assert page.all(".totals dd")[0].text == "2 2 kept"
    assert page.all(".totals dd")[1].text == "1 480 numbers, kept"


def test_the_summary_names_the_next_call_as_code(show):
    page = show(few("Dense_2"))
    codes = [code.text for code in page.all(".summary code")]
    assert codes[:2] == [
        f"rmtjax.{name}"
        for name in ("factorize(params, report.plan)", "nnx.factorize(model, report.plan)")
    ]
    assert "`" not in page.one(".summary").text


@pytest.mark.slow
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
    assert "3 above the threshold" in page.open()
    page.resize(360)
    page.sort(1)
    assert page.column(1)[:3] == [f"layers_{i}/kernel" for i in range(3)]
    assert page.run("document.documentElement.scrollWidth") == 360
