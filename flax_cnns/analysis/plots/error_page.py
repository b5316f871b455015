"""A page of mistakes: one HTML file without external parts, which needs no network.

Names of classes and files are escaped. The page's policy allows its own style and script only.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image

from flax_cnns.files import write_text
from flax_cnns.names import escape_unprintable

MAX_SIDE = 224  # pixels; larger images are reduced, so that the file's size is bounded
PIXEL_SIDE = 64  # images up to this side are enlarged to visible pixels and stored exactly


class Mistake(NamedTuple):
    """One image that the network classifies wrongly."""

    number: int  # of the image in its split, from 0
    pixels: np.ndarray  # u8 [H W C] with C = 1 or 3
    saliency: np.ndarray  # f32 [H W] in 0..1
    true_class: int
    guesses: Sequence[tuple[int, float]]  # (class, probability), the most likely first


class ErrorSummary(NamedTuple):
    """What stands above the mistakes."""

    title: str
    split: str
    lines: Sequence[str]  # accuracies with intervals, and what is shown
    # (true class, predicted class, images, images of the true class), the most frequent first
    confused: Sequence[tuple[int, int, int, int]]


def write_error_page(
    path: str | os.PathLike,
    summary: ErrorSummary,
    mistakes: Sequence[Mistake],
    class_names: Sequence[str],
) -> int:
    """Writes the page atomically and returns its size in bytes. Raises UserError if the file cannot
    be written."""
    names = [_escape(name) for name in class_names]
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    text = _PAGE.format(
        title=_escape(summary.title),
        split=_escape(summary.split),
        digest=digest,
        style=_STYLE,
        script=_SCRIPT,
        lines="\n".join(f"<p>{_escape(line)}</p>" for line in summary.lines),
        confused=_format_confused(summary.confused, mistakes, names),
        true_options=_format_options({each.true_class for each in mistakes}, names),
        predicted_options=_format_options({each.guesses[0][0] for each in mistakes}, names),
        cards="\n".join(_format_card(each, names, summary.split) for each in mistakes),
        count=len(mistakes),
    )
    write_text(path, text)
    return len(text.encode())


def encode_image(pixels: np.ndarray) -> str:
    """Returns a data: URI of u8 [H W C], C = 1 or 3: a PNG of a small image, a JPEG of a large one,
    reduced to `MAX_SIDE`."""
    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    stream = io.BytesIO()
    if max(image.size) <= PIXEL_SIDE:
        image.save(stream, "PNG", optimize=True)
        kind = "png"
    else:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
        image.save(stream, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode()}"


def overlay_saliency(pixels: np.ndarray, saliency: np.ndarray) -> np.ndarray:
    """Lays a map [H W] in 0..1 over the gray image: u8 [H W 3]."""
    gray = pixels.astype(np.float32).mean(-1, keepdims=True) / 255
    color = colormaps["inferno"](np.clip(saliency, 0, 1))[..., :3]
    return np.asarray(np.round(255 * (0.35 * gray + 0.65 * color)), np.uint8)


def _escape(text: str) -> str:
    return html.escape(escape_unprintable(text), quote=True)


def _format_options(classes: set[int], names: Sequence[str]) -> str:
    options = (f'<option value="{k}">{names[k]}</option>' for k in sorted(classes))
    return '<option value="">all</option>' + "".join(options)


def _format_confused(
    confused: Sequence[tuple[int, int, int, int]], mistakes: Sequence[Mistake], names: Sequence[str]
) -> str:
    rows = []
    for true, predicted, count, total in confused:
        pairs = [(each.true_class, each.guesses[0][0]) for each in mistakes]
        shown = pairs.count((true, predicted))
        button = f'<button type="button" data-true="{true}" data-predicted="{predicted}">'
        link = f"{button}show {shown}</button>" if shown else "not shown"
        rows.append(
            f"<tr><td>{names[true]}</td><td>{names[predicted]}</td><td>{count:,} of {total:,}</td>"
            f"<td>{link}</td></tr>"
        )
    return "\n".join(rows)


def _format_card(mistake: Mistake, names: Sequence[str], split: str) -> str:
    (predicted, probability), true = mistake.guesses[0], mistake.true_class
    small = " small" if max(mistake.pixels.shape[:2]) <= PIXEL_SIDE else ""
    what = f"Image {mistake.number} of {_escape(split)}: true class {names[true]}"
    bars = "".join(
        f'<li class="{"true" if k == true else "wrong" if not i else "other"}">'
        f'<span class="name">{names[k]}{" (true)" if k == true else ""}</span>'
        f'<span class="share">{100 * p:.1f} %</span>'
        f'<span class="bar" style="width:{100 * p:.1f}%"></span></li>'
        for i, (k, p) in enumerate(mistake.guesses)
    )
    overlay = encode_image(overlay_saliency(mistake.pixels, mistake.saliency))
    return (
        f'<article data-true="{true}" data-predicted="{predicted}">'
        f"<h3>{names[true]} <small>taken for</small> {names[predicted]}"
        f' <small class="number">image {mistake.number}</small></h3>'
        f'<div class="pair{small}">'
        f'<img src="{encode_image(mistake.pixels)}" alt="{what}, predicted {names[predicted]} with'
        f' {100 * probability:.1f} %">'
        f'<img src="{overlay}" alt="Saliency map of {names[predicted]} on image'
        f' {mistake.number}"></div>'
        f"<ol>{bars}</ol></article>"
    )


_STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1a1a1a; --soft: #595959; --card: #f4f4f4;
  --line: #c8c8c8; --wrong: #D55E00; --true: #009E73; --other: #8a8a8a; }
@media (prefers-color-scheme: dark) { :root { --back: #121212; --fore: #ececec; --soft: #b0b0b0;
  --card: #1f1f1f; --line: #4a4a4a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 80rem; background: var(--back);
  color: var(--fore); font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin-top: 1.6rem; }
h3 { font-size: .95rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
small, .note { color: var(--soft); font-weight: normal; font-size: .85em; }
p { margin: .3rem 0; max-width: 70ch; }
table { border-collapse: collapse; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; border-bottom: 1px solid var(--line);
  overflow-wrap: anywhere; }
form { display: flex; flex-wrap: wrap; gap: .5rem 1.2rem; align-items: center; margin: .6rem 0; }
select, button { font: inherit; color: inherit; background: var(--card); max-width: 100%;
  border: 1px solid var(--other); border-radius: 4px; padding: .15rem .5rem; }
:focus-visible { outline: 3px solid #0072B2; outline-offset: 2px; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
article { background: var(--card); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem; }
article[hidden] { display: none; }
.pair { display: flex; gap: .5rem; }
.pair img { width: calc(50% - .25rem); height: auto; align-self: flex-start; }
.small img { image-rendering: pixelated; }
ol { list-style: none; margin: .6rem 0 0; padding: 0; font-size: .85rem; }
li { display: grid; grid-template-columns: 1fr auto; margin-bottom: .25rem; }
.name { overflow-wrap: anywhere; }
.share { font-variant-numeric: tabular-nums; }
.bar { grid-column: 1 / 3; height: 5px; min-width: 1px; background: var(--other); }
.wrong .bar { background: var(--wrong); }
.true .bar { background: var(--true); }
.true .name { font-weight: bold; }
"""

_SCRIPT = """
const picks = [document.getElementById("true"), document.getElementById("predicted")];
const cards = [...document.querySelectorAll("article")];
const status = document.getElementById("shown");
function filter() {
  let shown = 0;
  for (const card of cards) {
    const fits = (pick, value) => pick.value === "" || pick.value === value;
    card.hidden = !(fits(picks[0], card.dataset.true) && fits(picks[1], card.dataset.predicted));
    shown += card.hidden ? 0 : 1;
  }
  status.textContent = shown + " of " + cards.length + " shown";
}
for (const pick of picks) pick.addEventListener("change", filter);
document.querySelector("form").addEventListener("reset", () => setTimeout(filter));
for (const button of document.querySelectorAll("td button")) {
  button.addEventListener("click", () => {
    picks[0].value = button.dataset.true;
    picks[1].value = button.dataset.predicted;
    filter();
    document.getElementById("mistakes").scrollIntoView();
    picks[0].focus({preventScroll: true});
  });
}
filter();
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;\
 style-src 'unsafe-inline'; script-src 'sha256-{digest}'">
<title>Mistakes: {title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>Mistakes of {title}</h1>
{lines}
</header>
<main>
<section aria-labelledby="confused">
<h2 id="confused">Most often confused</h2>
<table>
<thead><tr><th scope="col">true class</th><th scope="col">taken for</th><th scope="col">images</th>
<th scope="col">below</th></tr></thead>
<tbody>
{confused}
</tbody>
</table>
</section>
<section aria-labelledby="mistakes">
<h2 id="mistakes">Mistakes, the most confident first</h2>
<p class="note">Left: the image as the network sees it. Right: where the evidence for the predicted
class is (bright: more).</p>
<form>
<label>true class <select id="true">{true_options}</select></label>
<label>predicted <select id="predicted">{predicted_options}</select></label>
<button type="reset">show all</button>
<span id="shown" role="status">{count} shown</span>
</form>
<div class="cards">
{cards}
</div>
</section>
</main>
<script>{script}</script>
</body>
</html>
"""
