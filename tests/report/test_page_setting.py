"""The page of a report where things are against it: odd names, a phone, the dark, no JavaScript."""

import dataclasses

import numpy as np
import pytest
from helpers.page_reports import few, many, measured, THREE

import rmtjax
from rmtjax.planning import Kept

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


def test_names_are_no_markup(show):
    row = measured().plan["Dense_2/kernel"]
    names = [*HOSTILE, "reason"]
    plan = rmtjax.Plan(dict.fromkeys(names, row))
    plan["reason"] = dataclasses.replace(row, reason="<b>bold</b>")
    page = show(rmtjax.Report(plan), HOSTILE[0])
    expected = [
        name if name.isprintable() else name.encode("unicode_escape").decode() for name in names
    ]
    expected[names.index("")] = "(no name)"
    assert page.column(1) == expected
    assert page.column(3)[-1] == "<b>bold</b>"
    for number in (1, 2, 3):
        page.sort(number)
    page.search("<script>")
    assert page.column(1) == HOSTILE[:1]
    page.open()
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
    page.close_all()
    for opener in page.all(".opens button"):
        opener.click()
    assert page.run("document.documentElement.scrollWidth") == 360
    boxes = page.run(
        "[...document.querySelectorAll('tbody td, tbody th, button, input, svg')].map(node => {"
        "const box = node.getBoundingClientRect(); return [box.left, box.right, box.width] })"
    )
    assert all(0 <= left < right <= 360 and width for left, right, width in boxes)
    inside = (
        "[...document.querySelectorAll('svg text')].every(node => node.getBoundingClientRect()"
        ".right <= node.ownerSVGElement.getBoundingClientRect().right)"
    )
    assert page.run(inside)
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
    page.open(2)
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
    page.driver.execute_script("""
        window.refused = new Set();
        document.addEventListener("securitypolicyviolation", (event) => {
          refused.add(event.effectiveDirective);
        });
        window.attempt = () => {
          fetch("http://127.0.0.1:9/").catch(() => {});
          window.image = new Image();  // kept, so that no garbage collector ends its load
          image.src = "http://127.0.0.1:9/x.png?" + performance.now();
          const script = document.createElement("script");
          script.textContent = "window.hit = 1";
          document.body.append(script);
          document.body.setAttribute("onclick", "window.hit = 1; " + performance.now());
          document.body.click();  // the browser looks at a handler when it is needed
          return refused.size >= 4 && [...refused].sort();
        };
    """)
    # Again and again: on a busy machine the browser may put off or drop one of them.
    refused = page.wait("attempt()")
    assert refused == ["connect-src", "img-src", "script-src-attr", "script-src-elem"]
    assert page.run("window.hit") is None
    page.driver.get("about:blank")
    page.driver.get_log("browser")  # it has what was refused, and the fixture wants it empty


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


def test_a_shape_stands_on_one_line_and_never_breaks_in_a_number(show):
    shapes = {"usual": (3, 3, 512, 512), "long": (3, 3, 3, 10000, 10000, 10000)}
    plan = rmtjax.Plan({name: Kept("kept: by hand", shape) for name, shape in shapes.items()})
    page = show(rmtjax.Report(plan))
    assert page.column(4) == ["3x3x512x512", "3x3x3x10000x10000x10000"]
    lines = """[...document.querySelectorAll("td.shape")].map(cell =>
      [...cell.childNodes].filter(node => node.nodeType === 3).map(node => {
        const range = document.createRange();
        range.selectNode(node);
        return [...range.getClientRects()].map(box => box.top);
      }))"""
    usual, long = page.run(lines)
    assert [len(tops) for tops in usual + long] == [1] * 10
    assert len({top for tops in usual for top in tops}) == 1
