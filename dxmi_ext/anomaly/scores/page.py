"""The HTML page of scored images: a grid of cards with image and heat map, in one file.

A small script sorts and filters the cards; without it they are in descending order of the score. Imports the
standard library and ``dxmi_ext``; matplotlib for the color scale.
"""

from __future__ import annotations

import base64
import heapq
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import NamedTuple
from urllib.parse import quote

from dxmi_ext.anomaly.scores import plots
from dxmi_ext.engine.runs import report

THUMBNAIL = 200  # pixels of the longer side of images on the page
_LISTED = 100  # images without a score
_STYLE = """
body { max-width: 100rem } body > p { max-width: 60rem }
#cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: .75rem }
#cards.sides { grid-template-columns: 1fr 1fr; grid-auto-flow: dense; max-width: 60rem }
.sides .is-anomalous { grid-column: 1 } .sides .is-good { grid-column: 2 }
article { border: 1px solid #cbd2d9; border-radius: .4rem; padding: .5rem; content-visibility: auto;
  contain-intrinsic-size: auto 12rem }
article p { margin: 0 0 .4rem; font-size: .85rem; overflow-wrap: anywhere }
article div { display: grid; grid-template-columns: 1fr 1fr; gap: .3rem; align-items: start }
article img { width: 100%; height: auto; display: block }
.anomalous { color: #b42318; font-weight: 600 } .good { color: #1b7a43; font-weight: 600 }
#tools { position: sticky; top: 0; z-index: 1; padding: .5rem 0; background: #fff;
  display: flex; flex-wrap: wrap; gap: .4rem 1.2rem }
#tools button[aria-pressed=true] { background: #1f2933; color: #fff }
.scale, .ends { max-width: 24rem } .scale { height: .8rem }
.ends { display: grid; grid-template-columns: 1fr auto 1fr; gap: .5rem }
.ends :last-child { text-align: right }
"""
_TOOLS = """\
<div id="tools" hidden>
<span>Sort: <button data-sort="-score">highest score</button> <button data-sort="score">lowest score</button>
<button data-sort="class">class</button> <button data-sort="name">name</button></span>
<span>Show: <button data-show="all">all</button> <button data-show="anomalous">anomalous</button>
<button data-show="good">good</button> <button data-show="sides">side by side</button></span>
</div>"""
_SCRIPT = """\
<script>
const cards = document.getElementById('cards'), tools = document.getElementById('tools');
const all = [...cards.children], score = card => Number(card.dataset.score);
const text = key => (a, b) => a.dataset[key].localeCompare(b.dataset[key], undefined, {numeric: true});
const orders = {
  '-score': (a, b) => score(b) - score(a), score: (a, b) => score(a) - score(b),
  class: (a, b) => text('class')(a, b) || score(b) - score(a), name: text('name')};
function sort(by) { cards.append(...all.sort(orders[by])); }
function show(which) {
  cards.className = which === 'sides' ? 'sides' : '';
  for (const card of all)
    card.hidden = ['anomalous', 'good'].includes(which) && card.dataset.verdict !== which;
}
function choose(button) {
  for (const each of button.parentNode.querySelectorAll('button'))
    each.setAttribute('aria-pressed', each === button);
  button.dataset.sort ? sort(button.dataset.sort) : show(button.dataset.show);
}
tools.hidden = false;
tools.addEventListener('click', event => event.target.matches('button') && choose(event.target));
tools.querySelectorAll('span button:first-child').forEach(choose);
</script>"""


class Place(NamedTuple):
    """The text on the page about an image."""

    path: str
    score: float
    row: int
    """Row in scores.csv."""
    anomalous: bool
    heat_map: str = ""
    """Path of the heat map in its full size, relative to the page; empty if there is none."""


class Shown(NamedTuple):
    """An image as the page shows it."""

    place: Place
    size: tuple[int, int]
    """Width and height in pixels, as shown."""
    picture: bytes
    """JPEG."""
    heat_map: bytes
    """JPEG."""


class Worst:
    """The n images with the highest scores; among equal scores, those in earlier rows."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._heap: list[tuple[float, int, Shown]] = []

    def has_room_for(self, score: float) -> bool:
        """Whether there are fewer than n images, or one of them has a lower score."""
        return len(self._heap) < self.n or (self.n > 0 and score > self._heap[0][0])

    def add(self, shown: Shown) -> None:
        push = heapq.heappush if len(self._heap) < self.n else heapq.heappushpop
        push(self._heap, (shown.place.score, -shown.place.row, shown))

    def sorted(self) -> list[Shown]:
        """The images in descending order of the score."""
        return [shown for *_, shown in sorted(self._heap, reverse=True)]


def html_of(lead: str, worst: Sequence[Shown], failures: Mapping[str, str], *, heat_maps: bool) -> str:
    """The page as HTML.

    Args:
        lead: first sentence.
        worst: images in descending order of the score.
        failures: error messages of images without a score, by path.
        heat_maps: whether heatmaps/ contains the heat maps of all images.
    """
    root = _common_folder([*(shown.place.path for shown in worst), *failures])
    body = [f"<p>Paths are relative to {escape(_readable(root))}.</p>"] if root else []
    if worst:
        cards = (_card(shown, _relative(shown.place.path, root)) for shown in worst)
        body += [_scale(), _TOOLS, '<div id="cards">', *cards, "</div>", _SCRIPT]
    others = "all images" + (", and heatmaps/ has all heat maps" if heat_maps else "")
    body.append(f'<p><a href="scores.csv">scores.csv</a> has the scores of {others}.</p>')
    if failures:
        body.append(f"<h2>Without a score: {len(failures)}</h2>\n<ul>")
        listed = [(_relative(path, root), why) for path, why in failures.items()][:_LISTED]
        body += [f"<li>{escape(name)}: {escape(_readable(why))}</li>" for name, why in listed]
        body.append("</ul>" + ("<p>and others; see scores.csv</p>" if len(failures) > _LISTED else ""))
    title = f"The {len(worst)} images with the highest scores" if worst else "Scores"
    return report.page(title, lead, "\n".join(body), _STYLE)


def _scale() -> str:
    stops = ", ".join(f"rgb{color}" for color in plots.heat_colors(9))
    return (
        "<p>Each image and its heat map. All heat maps share one color scale; a line surrounds regions "
        "above the pixel threshold:</p>\n"
        f'<div class="scale" style="background: linear-gradient(to right, {stops})"></div>\n'
        '<div class="ends"><span>0</span><span>threshold</span><span>twice and above</span></div>'
    )


def _card(shown: Shown, name: str) -> str:
    path, score, _, anomalous, heat_map = shown.place
    name, verdict = escape(name), "anomalous" if anomalous else "good"
    # If images are sorted into folders, the folder is the class of the image.
    folder = escape(_readable(PurePath(path).parent.name))
    width, height = shown.size
    picture, heat = (
        f'<img alt="{what}{name}" width="{width}" height="{height}" loading="lazy" '
        f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        for what, jpeg in (("", shown.picture), ("heat map of ", shown.heat_map))
    )
    if heat_map:
        heat = f'<a href="{escape(_link(heat_map))}">{heat}</a>'
    data = f'data-score="{score:.9g}" data-verdict="{verdict}" data-class="{folder}" data-name="{name}"'
    return (
        f'<article class="is-{verdict}" {data}>\n'
        f'<p><span class="{verdict}">{verdict}</span>, score {score:.4g}<br>{name}</p>\n'
        f"<div>\n{picture}\n{heat}\n</div>\n</article>"
    )


def _common_folder(paths: Sequence[str]) -> str:
    """The folder that contains all images; empty if there is none."""
    try:
        return os.path.commonpath([os.path.dirname(path) for path in paths])
    except ValueError:  # no images, or absolute and relative paths
        return ""


def _relative(path: str, root: str) -> str:
    """A path as text, relative to a folder that contains it."""
    return _readable(os.path.relpath(path, root) if root else path)


def _link(path: str) -> str:
    return quote(os.fsencode(path))


def _readable(path: str) -> str:
    """A path as text, with undecodable bytes replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
