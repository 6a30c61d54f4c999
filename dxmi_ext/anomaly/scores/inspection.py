"""The command ``score``: a trained detector scores images, with a table, heat maps and a page as output, or
vectors, with a table as output.

Imports torch, numpy and ``dxmi_ext``; Pillow, matplotlib and tqdm while images are scored.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.anomaly.data import vectors
from dxmi_ext.anomaly.scores import inspected, page, score_files
from dxmi_ext.anomaly.scores.inspected import Picture
from dxmi_ext.anomaly.scores.page import Place, Shown, Worst
from dxmi_ext.anomaly.scores.scoring import ScoreError, Scorer, VectorScorer
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.settings import ConfigError, Settings, device_setting, setting
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data import listing, pixels
from dxmi_ext.images.data.contents import ImageDataError, resolved
from dxmi_ext.images.data.dataset import beyond, note_pages
from dxmi_ext.images.data.listing import PICTURES


@dataclasses.dataclass
class ScoreSettings(Settings):
    """Settings of the command ``score``."""

    output: str | None = setting(None, "folder to write; null: RUN/scores", path=True)
    batch_size: int = setting(32, "number of images per forward pass", minimum=1, maximum=2**16)
    threshold: float | None = setting(
        None, "score above which an image or row is anomalous; null: the run's", minimum=-1e38, maximum=1e38
    )
    heatmaps: bool = setting(True, "heat map of every image, as png in heatmaps/; false: none")
    worst: int = setting(
        1000, "number of images on the page, those with the highest scores", minimum=0, maximum=10**4
    )
    device: str = device_setting()


def split_arguments(given: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits arguments, in any order, into paths of images or folders and ``key=value`` settings.

    Raises:
        ConfigError: an argument is neither.
    """
    paths, settings = list[str](), list[str]()
    for text in given:
        key, equals, _ = text.partition("=")
        if key in ScoreSettings.__dataclass_fields__ and equals:
            settings.append(text)
        elif os.path.exists(text):
            paths.append(text)
        elif key.isidentifier() and equals:
            settings.append(text)  # the error names the nearest key
        else:
            raise ConfigError(
                f"IMAGE, FOLDER or FILE must exist, or an argument must be key=value, got {text!r}"
            )
    return paths, settings


def find_pictures(given: Iterable[str], output: Path) -> list[str]:
    """Paths of the given files and of the images in folders by the rule of ``images.data.listing``, each once
    and without images in output. A note lists skipped files.

    Raises:
        ConfigError: no images are given, a folder has none, or a file with another suffix is none.
        ImageDataError: a folder contains results of dxmi, or cannot be read.
    """
    found = dict[str, str]()
    for path in given:
        below = [path]
        if os.path.isdir(path):
            own = resolved(output)
            below, skipped = listing.gather(listing.scan(path), splits=True)
            below = [p for p in below if own not in resolved(p).parents]
            if unread := listing.summary((s for s in skipped if resolved(s.path) != own), path):
                runlog.note(f"skipped in {path}: {unread}")
            if not below:
                raise ConfigError(f"FOLDER must have images ({', '.join(PICTURES)}), got {path!r}")
        elif not path.lower().endswith(PICTURES):
            try:
                pixels.read(path, path)
            except ImageDataError as error:
                raise ConfigError(f"IMAGE must be an image, got {error}") from error
        for name in below:
            found.setdefault(os.path.abspath(name), name)
    if not found:
        raise ConfigError("IMAGE or FOLDER must be given, got none")
    return list(found.values())


def score(scorer: Scorer, paths: Sequence[str], output: Path, cfg: ScoreSettings) -> tuple[str, int]:
    """Writes scores.csv (COLUMNS), heatmaps/ and index.html into a folder.

    Rows are appended to scores.csv.unfinished, which is renamed to scores.csv at the end; after an
    interruption it contains the images scored so far. Threads decode images and draw heat maps while the
    network scores.

    Args:
        paths: paths from `find_pictures`.
        output: new or empty folder, or one of an earlier scoring, which is replaced.

    Returns:
        A summary of the scores, and the number of images without a score, whose rows give the error.

    Raises:
        UserError: the output contains something else, or another process is scoring into it.
    """
    threshold = scorer.threshold if cfg.threshold is None else cfg.threshold
    folder = output / score_files.HEAT_MAPS if cfg.heatmaps else None
    importlib.import_module("PIL.Image")  # before an earlier scoring is removed
    seconds, started = 0.0, time.perf_counter()
    with (
        score_files.room(output, folder),
        score_files.table(output / score_files.TABLE) as table,
        inspected.threads() as threads,
        runlog.Progress("score", len(paths), 0, enabled=True) as bar,
    ):
        findings = _Findings(threshold, scorer.pixel_threshold, folder, Worst(cfg.worst), threads)
        shows = cfg.heatmaps or cfg.worst > 0
        read = functools.partial(inspected.read, size=scorer.size, shows=shows, scale=scorer.scale)
        for first, batch in inspected.batches(
            inspected.ahead(threads, read, paths, 2 * cfg.batch_size), cfg.batch_size
        ):
            begun = time.perf_counter()
            scored = _score_batch(scorer, batch)
            seconds += time.perf_counter() - begun
            findings.drawn()  # waits for the batch before, so that few images wait in memory
            table.writerows(findings.row(i, *each) for i, each in enumerate(scored, first))
            bar.update(len(batch))
        findings.drawn()
        note_pages(findings.paged)
        if findings.clipped:
            runlog.note(beyond(findings.clipped, scorer.scale))
        worst, failures = findings.worst.sorted(), findings.failures
        lead = f"{findings.anomalous} of {len(paths)} images are anomalous (score above {threshold:.4g})."
        lead += f" {scorer.about_threshold}" if cfg.threshold is None and scorer.about_threshold else ""
        files.write_text(
            output / score_files.PAGE, page.html_of(lead, worst, failures, heat_maps=folder is not None)
        )
    whole, network = (1000 * s / len(paths) for s in (time.perf_counter() - started, seconds))
    pace = f"{whole:.1f} ms per image, of which the network takes {network:.1f} on {scorer.device}"
    return f"{lead} {pace}", len(failures)


def score_vectors(scorer: VectorScorer, given: Sequence[str], output: Path, cfg: ScoreSettings) -> str:
    """Writes scores.csv (VECTOR_COLUMNS), with one line for each row of a file, into a folder.

    Args:
        given: path of one file; see `vectors.rows_to_score`.
        output: see `score`.

    Returns:
        A summary of the scores.

    Raises:
        ConfigError: there is not exactly one file, or settings are for images.
        VectorDataError: the file is damaged or has other columns.
        ScoreError: scores are NaN.
        UserError: the output contains something else, or another process is scoring into it.
    """
    if len(given) != 1:
        raise ConfigError(f"FILE must be one file of vectors (.npz, .npy or .csv), got {len(given)}")
    for key in ("batch_size", "heatmaps", "worst"):
        if key in cfg.given:
            raise ConfigError(f"{key} is for images, got {getattr(cfg, key)} with a run of vectors")
    rows = vectors.rows_to_score(given[0], scorer.columns.total)
    threshold = scorer.threshold if cfg.threshold is None else cfg.threshold
    scores = scorer.scores(rows).tolist()
    if any(map(math.isnan, scores)):
        raise ScoreError("scores must be numbers, got NaN: the run's networks are damaged")
    with (
        score_files.room(output, None),
        score_files.table(output / score_files.TABLE, score_files.VECTOR_COLUMNS) as table,
    ):
        for i, value in enumerate(scores):
            row = {"row": i, "score": f"{value:.9g}", "anomalous": int(value > threshold)}
            table.writerow(row | {"threshold": threshold})
    anomalous, apart = sum(value > threshold for value in scores), scores.count(math.inf)
    lead = f"{anomalous} of {len(scores)} rows are anomalous (score above {threshold:.4g})."
    lead += f" {scorer.about_threshold}" if cfg.threshold is None and scorer.about_threshold else ""
    if not apart:
        return lead
    differ = "row differs" if apart == 1 else "rows differ"
    return f"{lead} {apart} {differ} in {scorer.columns.described()}, constant in training."


class _Findings:
    """The results so far, and the heat maps being drawn."""

    def __init__(
        self,
        threshold: float,
        pixel_threshold: float,
        folder: Path | None,
        worst: Worst,
        threads: ThreadPoolExecutor,
    ) -> None:
        self.threshold, self.pixel_threshold, self.folder = threshold, pixel_threshold, folder
        self.worst, self.failures, self.anomalous = worst, dict[str, str](), 0
        self.paged, self.clipped = list[str](), 0
        self._threads, self._drawing = threads, list[Future[Shown | None]]()

    def row(self, i: int, picture: Picture, value: float, scores: Tensor, error: str) -> dict[str, object]:
        """Returns the table row i of an image, and starts to draw its heat map if it is needed."""
        if error:
            self.failures[picture.path] = error
            return {"path": picture.path, "error": error}
        if picture.has_pages:
            self.paged.append(picture.path)
        self.clipped += picture.clipped
        anomalous, png, place = value > self.threshold, None, None
        self.anomalous += anomalous
        if self.folder is not None:  # the index makes names unique
            png = self.folder / f"{i:06d}-{Path(picture.path).stem[:40]}.png"
        heat_map = "" if png is None else f"{score_files.HEAT_MAPS}/{png.name}"
        if self.worst.has_room_for(value):
            place = Place(picture.path, value, i, anomalous, heat_map)
        if png is not None or place is not None:
            drawing = self._threads.submit(inspected.draw, picture, scores, self.pixel_threshold, png, place)
            self._drawing.append(drawing)
        return {
            "path": picture.path,
            "score": f"{value:.9g}",
            "anomalous": int(anomalous),
            "threshold": self.threshold,
            "heatmap": heat_map,
        }

    def drawn(self) -> None:
        """Waits until all heat maps are drawn."""
        for drawing in self._drawing:
            if (shown := drawing.result()) is not None:
                self.worst.add(shown)
        self._drawing = []


def _score_batch(scorer: Scorer, batch: Sequence[Picture]) -> list[tuple[Picture, float, Tensor, str]]:
    """Returns each image with its score, score map [h, w] and error message, empty if it was scored."""
    images = [picture.image for picture in batch if picture.image is not None]
    found: Iterator[tuple[float, Tensor]] = iter(())
    if images:
        maps = scorer.maps(torch.from_numpy(np.stack(images)))
        found = zip(scorer.scores(maps).tolist(), maps.cpu(), strict=True)
    results = []
    for picture in batch:
        value, scores, error = math.nan, torch.empty(0), picture.error
        if picture.image is not None:
            value, scores = next(found)
            error = "" if scores.isfinite().all() else "its scores are not finite"
        results.append((picture, value, scores, error))
    return results
