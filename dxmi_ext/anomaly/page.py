"""The page of scored pictures: the worst first, each beside its heat map, in a file that needs no other.

Imports the standard library and ``dxmi_ext``; matplotlib for the scale of colours.
"""

from __future__ import annotations

import base64
import heapq
import os
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from dxmi_ext.anomaly import plots
from dxmi_ext.engine import report

_LISTED = 100  # pictures without a score
_STYLE = """
article { margin: 0 0 2rem; border-top: 1px solid #cbd2d9; padding-top: .5rem }
article p { margin: 0 0 .5rem; overflow-wrap: anywhere }
article div { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .5rem }
article img { width: 100%; height: auto }
.anomalous { color: #b42318; font-weight: 600 } .good { color: #1b7a43; font-weight: 600 }
.scale, .ends { max-width: 20rem } .scale { height: .8rem }
.ends { display: grid; grid-template-columns: 1fr auto 1fr } .ends :last-child { text-align: right }
"""


class Place(NamedTuple):
    """What the page says of a picture."""

    path: str
    score: float
    row: int
    """Of scores.csv."""
    anomalous: bool


class Shown(NamedTuple):
    """What it shows of it."""

    place: Place
    size: tuple[int, int]
    """Width and height in pixels."""
    picture: bytes
    """As JPEG."""
    heat_map: bytes


class Worst:
    """The n pictures of the highest scores, of however many; of equal scores the earlier rows."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._heap: list[tuple[float, int, Shown]] = []

    def has_room_for(self, score: float) -> bool:
        """Whether the n are not yet there, or one has a lower score."""
        return len(self._heap) < self.n or (self.n > 0 and score > self._heap[0][0])

    def add(self, shown: Shown) -> None:
        push = heapq.heappush if len(self._heap) < self.n else heapq.heappushpop
        push(self._heap, (shown.place.score, -shown.place.row, shown))

    def sorted(self) -> list[Shown]:
        """The worst first."""
        return [shown for *_, shown in sorted(self._heap, reverse=True)]


def html_of(lead: str, worst: Sequence[Shown], failures: Mapping[str, str], *, heat_maps: bool) -> str:
    """The page.

    Args:
        lead: its first sentence.
        worst: in the order of the page.
        failures: pictures without a score, and why.
        heat_maps: whether heatmaps/ has all of them.
    """
    body = [_scale()] if worst else []
    body += [_article(shown) for shown in worst]
    others = "all pictures" + (", heatmaps/ all heat maps" if heat_maps else "")
    body.append(f'<p><a href="scores.csv">scores.csv</a> has the scores of {others}.</p>')
    if failures:
        body.append(f"<h2>Without a score: {len(failures)}</h2>\n<ul>")
        listed = list(failures.items())[:_LISTED]
        body += [f"<li>{escape(_readable(path))}: {escape(_readable(why))}</li>" for path, why in listed]
        body.append("</ul>" + ("<p>and others, see scores.csv</p>" if len(failures) > _LISTED else ""))
    title = f"The {len(worst)} pictures of the highest scores" if worst else "Scores"
    return report.page(title, lead, "\n".join(body), _STYLE)


def _scale() -> str:
    stops = ", ".join(f"rgb{colour}" for colour in plots.heat_colours(9))
    return (
        "<p>Each picture and its heat map. Colours mean the same in all of them; a line surrounds what is "
        "above the threshold of pixels:</p>\n"
        f'<div class="scale" style="background: linear-gradient(to right, {stops})"></div>\n'
        '<div class="ends"><span>0</span><span>threshold</span><span>twice and above</span></div>'
    )


def _article(shown: Shown) -> str:
    path, score, _, anomalous = shown.place
    name, verdict = escape(_readable(path)), "anomalous" if anomalous else "good"
    width, height = shown.size
    pictures = "\n".join(
        f'<img alt="{what}{name}" width="{width}" height="{height}" loading="lazy" '
        f'src="data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}">'
        for what, jpeg in (("", shown.picture), ("heat map of ", shown.heat_map))
    )
    return (
        f'<article>\n<p>{name}<br><span class="{verdict}">{verdict}</span>, score {score:.4g}</p>\n'
        f"<div>\n{pictures}\n</div>\n</article>"
    )


def _readable(path: str) -> str:
    """Of bytes that are no text, what can be shown."""
    return os.fsencode(path).decode("utf-8", "replace")
