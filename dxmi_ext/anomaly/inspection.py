"""The command ``score``: a trained detector scores images, with a table, heat maps and a page as output, or
vectors, with a table as output.

Imports torch, numpy and ``dxmi_ext``; Pillow, matplotlib and tqdm while images are scored.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import functools
import io
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.anomaly import detectors, page, plots, vectors
from dxmi_ext.anomaly.dataset import resized
from dxmi_ext.anomaly.page import Place, Shown, Worst
from dxmi_ext.anomaly.scoring import ScoreError, Scorer, VectorScorer
from dxmi_ext.engine import files, folders, runlog
from dxmi_ext.engine.settings import ConfigError, Settings, device_setting, setting
from dxmi_ext.images import listing, pixels
from dxmi_ext.images.contents import ImageDataError, printable
from dxmi_ext.images.listing import PICTURES
from dxmi_ext.images.pixels import NOMINAL, Scale

COLUMNS = ("path", "score", "anomalous", "threshold", "heatmap", "error")
VECTOR_COLUMNS = ("row", "score", "anomalous", "threshold")
_TABLE, _PAGE, _HEAT_MAPS = "scores.csv", "index.html", "heatmaps"
_OURS: files.Tree = {r"(?s)\d{6,}-.*\.png": None}  # in heatmaps/
_LONGEST = 512  # pixels of the longer side of heat maps
_THREADS = min(8, os.cpu_count() or 1)


@dataclasses.dataclass
class ScoreSettings(Settings):
    """Settings of the command ``score``."""

    output: str | None = setting(None, "folder to write; null: RUN/scores", path=True)
    batch_size: int = setting(32, "number of images per forward pass", minimum=1, maximum=2**16)
    threshold: float | None = setting(
        None, "score above which an image or row is anomalous; null: the run's", minimum=-1e38, maximum=1e38
    )
    heatmaps: bool = setting(True, "whether to write a heat map of every image to heatmaps/, as png")
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
                f"IMAGES must be an existing image, folder or file of vectors, or key=value, got {text!r}"
            )
    return paths, settings


def find_pictures(given: Iterable[str], output: Path) -> list[str]:
    """Paths of the given files and of the images in folders by the rule of ``images.listing``, each once and
    without images in output. A note lists skipped files.

    Raises:
        ConfigError: no images are given, or a folder has none.
        ImageDataError: a folder contains results of dxmi, or cannot be read.
    """
    found = dict[str, str]()
    for path in given:
        below = [path]
        if os.path.isdir(path):
            own = output.resolve()
            below, skipped = listing.gather(listing.scan(path), splits=True)
            below = [p for p in below if own not in Path(p).resolve().parents]
            if unread := listing.summary((s for s in skipped if Path(s.path).resolve() != own), path):
                runlog.note(f"skipped in {path}: {unread}")
            if not below:
                raise ConfigError(f"IMAGES: a folder must have images ({', '.join(PICTURES)}), got {path!r}")
        for name in below:
            found.setdefault(os.path.abspath(name), name)
    if not found:
        raise ConfigError("IMAGES must be images or folders of images, got none")
    return list(found.values())


def score(scorer: Scorer, pictures: Sequence[str], output: Path, cfg: ScoreSettings) -> tuple[str, int]:
    """Writes scores.csv (COLUMNS), heatmaps/ and index.html into a folder.

    Rows are appended to scores.csv.unfinished, which is renamed to scores.csv at the end; after an
    interruption it contains the images scored so far. Threads decode images and draw heat maps while the
    network scores.

    Args:
        pictures: paths from `find_pictures`.
        output: new or empty folder, or one of an earlier scoring, which is replaced.

    Returns:
        A summary of the scores, and the number of images without a score, whose rows give the error.

    Raises:
        UserError: the output contains something else.
    """
    threshold = scorer.threshold if cfg.threshold is None else cfg.threshold
    folder = output / _HEAT_MAPS if cfg.heatmaps else None
    _make_room(output, folder)
    seconds, started = 0.0, time.perf_counter()
    with (
        _table(output / _TABLE) as table,
        _threads() as threads,
        runlog.Progress("score", len(pictures), 0, enabled=True) as bar,
    ):
        findings = _Findings(threshold, scorer.pixel_threshold, folder, Worst(cfg.worst), threads)
        shows = cfg.heatmaps or cfg.worst > 0
        read = functools.partial(_read, size=scorer.size, shows=shows, scale=scorer.scale)
        for first, batch in _batches(_ahead(threads, read, pictures, 2 * cfg.batch_size), cfg.batch_size):
            begun = time.perf_counter()
            scored = _score_batch(scorer, batch)
            seconds += time.perf_counter() - begun
            findings.drawn()  # waits for the batch before, so that few images wait in memory
            table.writerows(findings.row(i, *each) for i, each in enumerate(scored, first))
            bar.update(len(batch))
        findings.drawn()
        worst, failures = findings.worst.sorted(), findings.failures
        lead = f"Of {len(pictures)} images {findings.anomalous} are anomalous (score above {threshold:.4g})."
        lead += f" {scorer.about_threshold}" if cfg.threshold is None and scorer.about_threshold else ""
        files.write_text(output / _PAGE, page.html_of(lead, worst, failures, heat_maps=folder is not None))
    whole, network = (1000 * s / len(pictures) for s in (time.perf_counter() - started, seconds))
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
        UserError: the output contains something else.
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
    _make_room(output, None)
    with _table(output / _TABLE, VECTOR_COLUMNS) as table:
        for i, value in enumerate(scores):
            row = {"row": i, "score": f"{value:.9g}", "anomalous": int(value > threshold)}
            table.writerow(row | {"threshold": threshold})
    anomalous, apart = sum(value > threshold for value in scores), scores.count(math.inf)
    lead = f"Of {len(scores)} rows {anomalous} are anomalous (score above {threshold:.4g})."
    lead += f" {scorer.about_threshold}" if cfg.threshold is None and scorer.about_threshold else ""
    return lead + (f" {apart} differ in {scorer.columns.described()}, constant in training." if apart else "")


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
        self._threads, self._drawing = threads, list[Future[Shown | None]]()

    def row(self, i: int, picture: _Picture, value: float, scores: Tensor, error: str) -> dict[str, object]:
        """Returns the table row i of an image, and starts to draw its heat map if it is needed."""
        if error:
            self.failures[picture.path] = error
            return {"path": picture.path, "error": error}
        anomalous, png, place = value > self.threshold, None, None
        self.anomalous += anomalous
        if self.folder is not None:  # the index makes names unique
            png = self.folder / f"{i:06d}-{Path(picture.path).stem[:40]}.png"
        if self.worst.has_room_for(value):
            place = Place(
                picture.path, value, i, anomalous, "" if png is None else f"{_HEAT_MAPS}/{png.name}"
            )
        if png is not None or place is not None:
            drawing = self._threads.submit(_draw, picture, scores, self.pixel_threshold, png, place)
            self._drawing.append(drawing)
        return {
            "path": picture.path,
            "score": f"{value:.9g}",
            "anomalous": int(anomalous),
            "threshold": self.threshold,
            "heatmap": "" if png is None else f"{_HEAT_MAPS}/{png.name}",
        }

    def drawn(self) -> None:
        """Waits until all heat maps are drawn."""
        for drawing in self._drawing:
            if (shown := drawing.result()) is not None:
                self.worst.add(shown)
        self._drawing = []


# --- reading and drawing, in threads -----------------------------------------------------------------


class _Picture(NamedTuple):
    path: str
    image: np.ndarray | None
    """uint8 [3, size, size], input of the network; None if the file cannot be read."""
    shown: np.ndarray | None
    """uint8 [H, W, 3], for the heat map and the page; None if neither shows it."""
    error: str = ""


def _read(path: str, size: int, shows: bool, scale: Scale = NOMINAL) -> _Picture:
    try:
        picture = pixels.decode(path, path, scale, upright=True)
    except ImageDataError as error:
        return _Picture(path, None, None, str(error).removeprefix(f"{printable(path)}: "))
    image = np.ascontiguousarray(resized(picture, size).transpose(2, 0, 1))
    return _Picture(path, image, _thumbnail(picture, _LONGEST) if shows else None)


def _thumbnail(picture: np.ndarray, longest: int) -> np.ndarray:
    """Shrinks an image [H, W, 3] so that its longer side has at most ``longest`` pixels."""
    height, width = picture.shape[:2]
    scale = longest / max(height, width)
    if scale >= 1:
        return picture
    from PIL import Image

    size = max(1, round(scale * width)), max(1, round(scale * height))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC, reducing_gap=3))


def _draw(
    picture: _Picture, scores: Tensor, pixel_threshold: float, png: Path | None, place: Place | None
) -> Shown | None:
    """Writes a heat map if it has a file, and returns the thumbnails if the image has a place on the page."""
    from PIL import Image

    assert picture.shown is not None
    height, width = picture.shown.shape[:2]
    pixels = detectors.localise(scores[None], (height, width))[0].numpy()
    heat_map = plots.heat_map(picture.shown, pixels, pixel_threshold)
    if png is not None:
        Image.fromarray(heat_map).save(png, compress_level=3)
    if place is None:
        return None
    small, heat = (_thumbnail(each, page.THUMBNAIL) for each in (picture.shown, heat_map))
    return Shown(place, (small.shape[1], small.shape[0]), _jpeg(small), _jpeg(heat))


def _jpeg(pixels: np.ndarray) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=80, subsampling=0)
    return file.getvalue()


def _score_batch(scorer: Scorer, batch: Sequence[_Picture]) -> list[tuple[_Picture, float, Tensor, str]]:
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


# --- plumbing ----------------------------------------------------------------------------------------


def check_output(output: Path) -> None:
    """Checks that a folder is new, empty or from an earlier scoring; writes nothing.

    Raises:
        folders.FolderError: it contains something else.
    """
    folders.check(output, "scores", _is_unmarked)


def _is_unmarked(output: Path) -> bool:
    """Whether a folder contains scores from a version that did not mark folders."""
    head = ",".join(COLUMNS).encode() + b"\r\n"
    tables = (output / name for name in (_TABLE, f"{_TABLE}.unfinished"))
    return any(table.read_bytes().startswith(head) for table in tables if table.is_file())


def _make_room(output: Path, heat_maps: Path | None) -> None:
    check_output(output)
    output.mkdir(parents=True, exist_ok=True)
    folders.mark(output, "scores")
    for name in (_TABLE, f"{_TABLE}.unfinished", _PAGE):
        files.remove(output / name)
    files.remove(output / _HEAT_MAPS, _OURS)
    (heat_maps or output).mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _table(path: Path, columns: Sequence[str] = COLUMNS) -> Iterator[csv.DictWriter[str]]:
    """Opens a csv file under a temporary name and renames it when it is complete. Each row is flushed."""
    making = files.unfinished(path)
    options: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}  # odd names
    try:
        with files.naming(making), making.open("w", buffering=1, **options) as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            yield table
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        runlog.note(f"{making} contains the scores so far")
        raise
    making.replace(path)


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="score")
    try:
        yield threads
    finally:
        threads.shutdown(cancel_futures=True)


def _ahead(
    threads: ThreadPoolExecutor, function: Callable[[str], _Picture], arguments: Iterable[str], ahead: int
) -> Iterator[_Picture]:
    """Results in order, with at most ``ahead`` computed in advance."""
    waiting = collections.deque[Future[_Picture]]()
    for argument in arguments:
        waiting.append(threads.submit(function, argument))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _batches(pictures: Iterator[_Picture], size: int) -> Iterator[tuple[int, list[_Picture]]]:
    """Batches of images, each with the index of its first."""
    first, batch = 0, list[_Picture]()
    for picture in pictures:
        batch.append(picture)
        if len(batch) == size:
            yield first, batch
            first, batch = first + size, []
    if batch:
        yield first, batch
