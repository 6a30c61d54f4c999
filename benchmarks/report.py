"""The table of a run of benchmarks, as text, JSON and a picture. Imports matplotlib if it is installed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PICTURED = {
    "eager": "tab:blue",
    "lean eager": "tab:cyan",
    "torch.compile": "tab:orange",
    "plain loop": "tab:gray",
    "plain loop, fused Adam": "silver",
}
"""The peers that do all of the work of an op, and their colors."""


@dataclasses.dataclass
class Row:
    """The time per call of an implementation and its ratio to ours; see conftest.py."""

    place: str
    group: str
    implementation: str
    median_us: float | None = None
    least_us: float | None = None
    ratio: float | None = None
    least_ratio: float | None = None
    skipped: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def gb_per_s(self) -> float | None:
        """Bandwidth of the bytes that have to be moved, at the least time; None if there are too few."""
        count = self.facts.get("bytes", 0)
        return count / self.least_us / 1e3 if self.least_us and count > 2**20 else None


class Report:
    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, row: Row) -> None:
        self.rows.append(row)

    def lines(self) -> Iterator[str]:
        """The whole table, followed by the rows in which ours is slower."""
        groups = dict.fromkeys((row.group, row.place) for row in self.rows)
        for group, place in groups:
            yield ""
            yield f"{group}, on {place}"
            yield (
                f"  {'us per call':26}{'median':>11}{'least':>11}{'ratio':>9}{'least':>9}"
                f"{'GB/s':>9}{'of copy':>9}{'kept':>7}"
            )
            yield from (self._line(row) for row in self.rows if (row.group, row.place) == (group, place))
        losses = [row for row in self.rows if row.implementation in PICTURED and row.ratio and row.ratio < 1]
        if groups:
            yield ""
            yield f"slower than a peer in {len(losses)} of {self._compared()} comparisons"
            for row in losses:
                yield f"  {row.ratio:.2f} x {row.implementation}: {row.group}, on {row.place}"

    def save(self, folder: Path, environments: list[dict[str, Any]]) -> str:
        """Writes report.json and, with matplotlib, report.png; returns a text that names them."""
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {k: v for k, v in dataclasses.asdict(row).items() if k != "facts" and v not in (None, "")}
            | {k: v for k, v in row.facts.items() if k in ("shape", "dtype", "bytes", "kept", "peak_bytes")}
            | {"gb_per_s": row.gb_per_s, "of_copy": self._of_copy(row)}
            for row in self.rows
        ]
        content = {"environments": environments, "rows": rows}
        (folder / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        try:
            self._draw(folder / "report.png", environments)
        except ImportError:
            return f"wrote {folder}/report.json; no picture: matplotlib is not installed"
        return f"wrote {folder}/report.json, {folder}/report.png"

    def _line(self, row: Row) -> str:
        if row.skipped:
            return f"  {row.implementation:26} skipped: {row.skipped}"

        def cell(value: float | None, width: int, digits: int) -> str:
            return " " * width if value is None else f"{value:{width}.{digits}f}"

        return (
            f"  {row.implementation:26}{row.median_us:11.1f}{row.least_us:11.1f}"
            f"{cell(row.ratio, 9, 2)}{cell(row.least_ratio, 9, 2)}{cell(row.gb_per_s, 9, 1)}"
            f"{cell(self._of_copy(row), 9, 2)}{cell(row.facts.get('kept'), 7, 1)}"
        ).rstrip()

    def _of_copy(self, row: Row) -> float | None:
        """Bandwidth as a share of the large copy's in the same run and place."""
        for roof in self.rows:
            if (roof.implementation, roof.place) == ("copy", row.place.removesuffix(" graph")):
                return row.gb_per_s / roof.gb_per_s if row.gb_per_s and roof.gb_per_s else None
        return None

    def _compared(self) -> int:
        return sum(row.implementation in PICTURED and row.ratio is not None for row in self.rows)

    def _draw(self, path: Path, environments: list[dict[str, Any]]) -> None:
        """A bar for each peer: the factor by which ours is faster."""
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot

        drawn = [row for row in self.rows if row.implementation in PICTURED and row.ratio]
        by_place = {
            place: [r for r in drawn if r.place == place] for place in dict.fromkeys(r.place for r in drawn)
        }
        height = 1.5 + 0.19 * max((len(rows) for rows in by_place.values()), default=0)
        figure, axes = pyplot.subplots(
            1,
            len(by_place) or 1,
            figsize=(8 * (len(by_place) or 1), height),
            squeeze=False,
            layout="constrained",
        )
        handles: dict[str, Any] = {}
        for axis, (place, rows) in zip(axes[0], by_place.items(), strict=False):
            position, ticks = 0.0, {}
            for group in dict.fromkeys(row.group for row in rows):
                bars = [row for row in rows if row.group == group]
                ticks[group] = position + (len(bars) - 1) / 2
                for row in bars:
                    assert row.ratio
                    color = PICTURED[row.implementation]
                    axis.barh(position, row.ratio - 1, left=1, color=color, label=row.implementation)
                    axis.text(max(row.ratio, 1), position, f" {row.ratio:.2g}", va="center", fontsize=7)
                    position += 1
                position += 0.6
            axis.set_yticks(list(ticks.values()), list(ticks), fontsize=8)
            axis.set_xscale("log")
            axis.axvline(1, color="black", linewidth=0.8)
            axis.margins(x=0.1, y=0.01)
            axis.invert_yaxis()
            axis.set_xlabel("times faster than the peer; left of 1: slower")
            axis.set_title(place)
            axis.xaxis.set_major_formatter("{x:g}")
            handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=8)
        versions = environments[-1]
        figure.suptitle(
            f"dxmi_ext {versions['dxmi_ext']}, torch {versions['torch']}, "
            f"{', '.join(dict.fromkeys(e['device'] for e in environments))}, {versions['date']}",
            fontsize=9,
        )
        figure.savefig(path, dpi=150)
        pyplot.close(figure)
