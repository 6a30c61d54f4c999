"""A run as one self-contained page: numbers, curves, pictures, settings.

Imports the standard library and ``dxmi_ext``; PyYAML and matplotlib where they are used.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from html import escape
from pathlib import Path
from typing import Any

from dxmi_ext.engine.output import plots, runlog
from dxmi_ext.engine.runs import config, identity
from dxmi_ext.engine.settings import Settings, setting
from dxmi_ext.engine.storage import files, folders

_LAST = 4  # number of pictures shown of those drawn during training
_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
{generator}
<title>{title}</title>
<style>
body {{ max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1f2933 }}
body {{ font: 15px/1.5 system-ui, sans-serif }}
h1 {{ font-size: 1.5rem }} h2 {{ font-size: 1.1rem; margin-top: 2rem }}
table {{ border-collapse: collapse }} td {{ padding: .15rem 1.5rem .15rem 0; vertical-align: top }}
td:first-child, figcaption {{ color: #52606d }} td {{ font-variant-numeric: tabular-nums }}
figure {{ margin: 1rem 0 }} img {{ max-width: 100% }}
pre {{ background: #f5f7fa; padding: 1rem; overflow: auto }}
{style}
</style>
<h1>{title}</h1>
<p>{lead}</p>
{body}
</html>
"""


@dataclasses.dataclass
class ReportSettings(Settings):
    """Settings of the command ``report``."""

    output: str | None = setting(None, "file to write; null: RUN/report.html", path=True)


def page(title: str, lead: str, body: str, style: str = "") -> str:
    """A page in this style.

    Args:
        title, lead: plain text; the lead is below the title.
        body: html.
        style: additional css.
    """
    return _PAGE.format(
        generator=folders.GENERATOR, title=escape(title), lead=escape(lead), body=body, style=style
    )


def html_of(directory: Path) -> str:
    """The page of a run, finished or not.

    Args:
        directory: the run's folder, with config.yaml and, if they exist, metrics.jsonl, summary.json and
            pictures.
    """
    summary, rows = identity.summary_of(directory), runlog.read_metrics(directory / "metrics.jsonl")
    failure = files.read_json(directory / "failure.json")
    if summary:
        state = f"Finished: {summary.get('iterations')} iterations in {summary.get('wall_seconds')} s."
    elif failure:
        state = f"Stopped{_place(failure)}: steps were still not finite after all rollbacks."
    elif rows:
        state = f"Not finished: last logged at iteration {rows[-1]['iteration']} of {rows[-1]['phase']}."
    else:
        state = "Not finished: nothing logged yet."
    pictures = sorted(path for path in directory.glob("*.png") if path.name != "curves.png")  # drawn anew
    while_training = sorted((directory / "pictures").glob("*.png"), key=lambda path: path.stat().st_mtime_ns)
    sections = {
        "Numbers": _table(summary or failure),
        "Curves": _curves(directory / "metrics.jsonl"),
        "Pictures": "\n".join(_figure(path.read_bytes(), path.stem) for path in pictures),
        "While training": "\n".join(_figure(p.read_bytes(), p.stem) for p in while_training[-_LAST:]),
        "Settings": f"<pre>{escape((directory / 'config.yaml').read_bytes().decode(errors='replace'))}</pre>",
    }
    return page(
        f"{config.peek(directory / 'config.yaml', 'recipe')}: {directory}",
        state,
        "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections.items() if content),
    )


def _place(failure: dict[str, Any]) -> str:
    """Where a run stopped, according to failure.json."""
    rollbacks = failure.get("rollbacks")
    last = rollbacks[-1] if isinstance(rollbacks, list) and rollbacks else None
    if not isinstance(last, dict) or not {"iteration", "phase"} <= last.keys():
        return ""
    return f" at iteration {last['iteration']} of {last['phase']}"


def _table(numbers: dict[str, Any]) -> str:
    if not numbers:
        return ""
    rows = []
    for name, value in numbers.items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        shown = f"{value:.4g}" if isinstance(value, float) else shown
        rows.append(f"<tr><td>{escape(name)}</td><td>{escape(shown)}</td></tr>")
    return f"<table>\n{''.join(rows)}\n</table>"


def _curves(metrics_jsonl: Path) -> str:
    """Learning curves of all metrics."""
    picture = io.BytesIO()
    plots.curves(picture, metrics_jsonl)
    return _figure(picture.getvalue(), "thin: as logged; bold: a running mean") if picture.getvalue() else ""


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
