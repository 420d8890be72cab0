"""The table and the page: whole, self-contained, and saying what the document says."""

import io
import json
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from rich.console import Console

from layerroute.evaluation.cells import headline, kind_rows, with_tools_line
from layerroute.evaluation.drawing import curves, heatmap, histograms
from layerroute.evaluation.evaluate import evaluate
from layerroute.evaluation.options import EvaluationConfig
from layerroute.evaluation.report import render, write_report
from layerroute.evaluation.table import print_table

CONTROLS = ("open", "random", "one_mask", "two_masks")
VOID = {"meta", "br", "hr", "img", "input", "link"}


@pytest.fixture
def document(routed, backbone, steps):
    return evaluate(routed, backbone, steps, EvaluationConfig(bootstrap=50, curve_steps=8, controls=CONTROLS))


@pytest.fixture
def half(routed, backbone, steps):
    """A document with one kind only: figures are missing everywhere."""
    planning = [step for step in steps if step.kind == "planning"]
    return evaluate(routed, backbone, planning, EvaluationConfig(bootstrap=50, curve_steps=8, controls=CONTROLS))


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(document):
    page, text = Page(), render(document)
    page.feed(text)
    assert page.open == []  # every tag is closed
    assert not {"script", "link", "img", "iframe", "object"} & set(page.seen)
    assert not [name for name, _ in page.attributes if name in {"src", "href", "xlink:href"} or name.startswith("on")]
    assert "http://" not in text
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_holds_the_whole_document(document):
    blocks = re.findall(r"<pre>(.*?)</pre>", render(document), flags=re.DOTALL)
    assert json.loads(unescape(blocks[-1])) == document
    assert json.loads(unescape(blocks[-2])) == document["options"]


def test_the_page_and_the_table_say_the_same(document):
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(document, console)
    text, table = render(document), console.export_text()
    assert headline(document) in unescape(text)
    assert headline(document) in table
    for row in kind_rows(document):
        for cell in row:
            assert cell in unescape(text)
            assert cell in table
    assert document["planning_with_tools"]["steps"] > 0
    assert with_tools_line(document) in unescape(text)
    assert with_tools_line(document) in " ".join(table.split())


def test_names_with_brackets_are_printed_as_they_are(document):
    console = Console(width=80, record=True, file=io.StringIO())
    print_table(document | {"adapter": "runs/[bold]/a"}, console)
    assert "runs/[bold]/a" in console.export_text()


def test_the_figures_are_there(document):
    text = render(document)
    for title in ("Which blocks run", "How decided the gates are", "Quality against skipping", "Controls at equal"):
        assert title in text
    assert len(re.findall("<svg", text)) == 3
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ElementTree.fromstring(svg)
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", text, flags=re.DOTALL).lower().replace("planning", "")


def test_missing_figures_are_said_to_be_missing(half):
    text = render(half)
    assert "n/a" in text
    assert "no context length" in text
    print_table(half, Console(width=80, quiet=True))


def test_without_curve_and_controls_there_are_no_such_sections(document):
    text = render(document | {"curve": [], "controls": {}})
    assert "Quality against skipping" not in text
    assert "Controls at equal" not in text


def test_names_are_escaped(document):
    text = render(document | {"adapter": "<script>alert(1)</script>"})
    assert "<script>" not in text


def test_it_is_written_whole(document, tmp_path):
    write_report(tmp_path / "deep" / "report.html", document)
    assert (tmp_path / "deep" / "report.html").read_text(encoding="utf-8") == render(document)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["report.html"]


def test_a_heatmap_has_a_cell_for_each_block_and_kind():
    drawn = heatmap({"tool_call": [0.0, 0.5, 1.0], "planning": [1.0, None, 1.0]})
    assert drawn.count("<rect") == 6
    assert "block 1: runs for 50.0 % of tool calls" in drawn
    assert "block 1: no step" in drawn


@pytest.mark.parametrize("blocks", [1, 30, 80])
def test_a_heatmap_of_any_depth_can_be_drawn(blocks):
    ElementTree.fromstring(heatmap({"tool_call": [0.5] * blocks, "planning": [1.0] * blocks}))


def test_histograms_and_curves_of_little_can_be_drawn():
    ElementTree.fromstring(histograms([0.0, 0.5, 1.0], {"tool_call": [0, 0], "planning": [0, 7]}, 0.5))
    ElementTree.fromstring(histograms([0.0, 0.5, 1.0], {"tool_call": [0, 0], "planning": [0, 0]}, 0.5))
    ElementTree.fromstring(curves({"tool_call": [(0.0, 0.0, 1.0)], "planning": []}))
    ElementTree.fromstring(curves({"tool_call": [(0.0, 0.9, 1e9)], "planning": [(0.0, 0.0, 0.4)]}))


def test_the_curve_marks_where_the_adapter_stands():
    drawn = curves({"tool_call": [(-1.0, 0.5, 1.2), (0.0, 0.25, 1.02), (1.0, 0.1, 1.0)], "planning": []})
    marks = re.findall(r'<circle[^>]* r="(\d)"', drawn)
    assert sorted(marks) == ["4", "4", "6"]
    assert "offset +0: skips 25.0 %, perplexity +2.0 %" in drawn


def test_the_curve_is_logarithmic_upwards_and_linear_sideways():
    drawn = curves({"tool_call": [(-2.0, 0.4, 4.0), (-1.0, 0.2, 2.0), (0.0, 0.0, 1.0)], "planning": []})
    spots = re.search(r'polyline points="([^"]*)"', drawn)[1].split()
    across, down = zip(*(map(float, spot.split(",")) for spot in spots), strict=True)
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=0.11) != 0
    assert down[1] - down[0] == pytest.approx(down[2] - down[1], abs=0.11)
    assert down[2] < down[0]  # worse is higher up
