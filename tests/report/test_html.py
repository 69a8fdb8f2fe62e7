"""The page needs nothing but itself, and nothing in a model's names becomes markup."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pot_sparsity.report.html import render_html
from pot_sparsity.report.io import read_report
from pot_sparsity.report.schema import Report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]
        self.ids += [value or "" for key, value in attrs if key == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture
def report() -> Report:
    return read_report(Path(__file__).parent / "sample_report.json")


@pytest.fixture
def html(report: Report) -> str:
    return render_html(report)


def test_self_contained(html: str) -> None:
    page = Page(html)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "embed", "img", "base"} & set(page.tags)
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href", "action")]
    assert all(value.startswith("#") for value in links)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    assert not [key for key, _ in page.attributes if key.startswith("on")]


def test_names_from_the_model_are_escaped(html: str) -> None:
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "net&lt;b&gt;.onnx" in html
    assert "only 300 calibration samples &lt;i&gt;" in html


def test_drawings_are_well_formed_and_their_identifiers_unique(html: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(drawings) == 3
    for drawing in drawings:
        ElementTree.fromstring(drawing)
    ids = Page(html).ids
    assert len(ids) == len(set(ids)) > 100
    used = set(re.findall(r'(?:"#|url\(#)([^")]+)', html))
    assert used <= set(ids)
    assert len(used) > 10


def test_numbers_are_there(html: str) -> None:
    text = re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)
    for piece in (
        "sparsity 60.6 % (3,160 of 5,216 weights), iteration 1 of 1",
        "sparse INT8",
        "-0.75 [-1.30, -0.20]",
        "98.75",
        "65.1 %",
        "its input is an Add",
        "into stem/conv",
        "both operands are activations",
        "matches the ignored pattern ^stem",
        "method: admm",
        "255 fitted on, 45 held out",
        "2026.4.1",
        "1 (chosen)",
        "[?, 3, 8, 8] float32",
        "of unknown rank",
    ):
        assert piece in text, piece


def test_same_report_same_bytes(report: Report, html: str) -> None:
    assert render_html(report.model_copy(deep=True)) == html


def test_a_run_without_anything_optional(report: Report) -> None:
    empty: dict[str, object] = {
        "iterations": [],
        "decisions": [],
        "edits": [],
        "skipped": [],
        "not_fused": [],
        "variants": [],
        "warnings": [],
        "layers": [layer.model_copy(update={"relative_error": None}) for layer in report.layers],
    }
    page = render_html(report.model_copy(update=empty))
    assert page.count("<svg") == 1
    assert not Page(page).open


def test_a_network_of_hundreds_of_layers(report: Report) -> None:
    many = [report.layers[1].model_copy(update={"name": f"layer {n}"}) for n in range(400)]
    assert len(render_html(report.model_copy(update={"layers": many}))) < 2_000_000
