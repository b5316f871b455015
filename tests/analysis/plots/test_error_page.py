"""The page of mistakes: escaped names, no external parts, images that can be read."""

from __future__ import annotations

import base64
import hashlib
import html.parser
import io
import re

import numpy as np
import pytest
from PIL import Image

from flax_cnns.analysis.plots import error_page
from flax_cnns.analysis.plots.error_page import ErrorSummary, Mistake

EVIL = ('<script>alert("1")</script>', "\" onerror='alert(2)", "a & b \x1b[31m\udce9")


class Reader(html.parser.HTMLParser):
    """Collects the tags with their attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)

    def find(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def decode(uri):
    kind, data = re.fullmatch(r"data:image/(png|jpeg);base64,(.+)", uri).groups()
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert image.format.lower() == kind
    return np.asarray(image)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    random = np.random.default_rng(0)
    gray = random.integers(256, size=(28, 28, 1), dtype=np.uint8)
    photo = random.integers(256, size=(200, 300, 3), dtype=np.uint8)
    mistakes = [
        Mistake(7, gray, random.random((28, 28)), 0, [(1, 0.9), (0, 0.08), (2, 0.02)]),
        Mistake(9, photo, random.random((200, 300)), 2, [(0, 0.5), (2, 0.4), (1, 0.1)]),
    ]
    confused = [(0, 1, 3, 20), (2, 1, 2, 30)]
    summary = ErrorSummary("run <b>one</b>", "test", ["accuracy 90.00% [85.00, 95.00]"], confused)
    path = tmp_path_factory.mktemp("page") / "errors.html"
    size = error_page.write_error_page(path, summary, mistakes, EVIL)
    assert size == path.stat().st_size < 200_000
    return path.read_text(encoding="utf-8"), gray


def test_names_cannot_inject_anything(page):
    text, _ = page
    read = Reader(text)
    assert len(read.find("script")) == 1
    assert not read.find("b")
    assert not [name for _, attributes in read.tags for name in attributes if name[:2] == "on"]
    assert EVIL[0] in "".join(read.text)  # shown as it is
    assert r"a & b \x1b[31m\xe9" in "".join(read.text)
    assert read.find("img")[0]["alt"].startswith(
        f"Image 7 of test: true class {EVIL[0]}, predicted"
    )
    assert "Mistakes: run <b>one</b>" in read.text


def test_nothing_is_loaded_from_outside_and_the_policy_allows_the_pages_own_script(page):
    text, _ = page
    read = Reader(text)
    links = [a[key] for _, a in read.tags for key in ("src", "href", "srcset") if key in a]
    assert len(links) == 4
    assert all(link.startswith("data:image/") for link in links)
    assert "http" not in re.sub(r'http-equiv|src="[^"]*"', "", text)
    policy = next(a["content"] for a in read.find("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; img-src data:;")
    script = re.search(r"<script>(.*)</script>\n</body>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.endswith(f"script-src 'sha256-{digest}'")


def test_small_images_are_exact_and_large_ones_are_reduced(page):
    text, gray = page
    images = [decode(attributes["src"]) for attributes in Reader(text).find("img")]
    np.testing.assert_array_equal(images[0], gray[..., 0])
    assert [image.shape for image in images[1:]] == [(28, 28, 3), (149, 224, 3), (149, 224, 3)]
    classes = [a.get("class") for a in Reader(text).find("div")]
    assert classes == ["cards", "pair small", "pair"]


def test_the_filter_has_the_classes_that_are_shown_and_pairs_say_how_many(page):
    text, _ = page
    read = Reader(text)
    assert [a["value"] for a in read.find("option")] == ["", "0", "2", "", "0", "1"]
    cards = [(a["data-true"], a["data-predicted"]) for a in read.find("article")]
    assert cards == [("0", "1"), ("2", "0")]
    shown = [a for a in read.find("button") if "data-true" in a]
    assert [(a["data-true"], a["data-predicted"]) for a in shown] == [("0", "1")]
    assert {"show 1", "3 of 20", "2 of 30", "not shown"} <= set(read.text)
    widths = [a["style"] for a in read.find("span") if a.get("class") == "bar"]
    assert widths[:3] == ["width:90.0%", "width:8.0%", "width:2.0%"]


def test_the_map_colors_the_image(page):
    _, gray = page
    low, high = (error_page.overlay_saliency(gray, np.full((28, 28), x)) for x in (0.0, 1.0))
    assert low.dtype == np.uint8
    np.testing.assert_allclose(low, 0.35 * gray.repeat(3, -1), atol=3)  # inferno starts in black
    assert high[..., 0].min() > 150
