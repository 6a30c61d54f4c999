"""Additional logging of a run's numbers and pictures: tensorboard, Weights & Biases.

Imports the standard library and the modules errors, files and folders of the engine; tensorboard and wandb
where used.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.storage import files, folders


class Place(NamedTuple):
    """An iteration of a run."""

    phase: str
    iteration: int
    """within the phase"""
    total: int
    """over all phases"""


class Sink(Protocol):
    """Receives a ``RunLog``'s data, in the order of iterations."""

    def open(self) -> None:
        """Called first, once the run's folder exists."""

    def rewind(self, last: int) -> None:
        """The run goes back from the total iteration ``last`` (-1: none), possibly of an earlier process. The
        iterations that it keeps are logged again."""

    def scalars(self, place: Place, values: Mapping[str, float]) -> None:
        """Logs numbers by name; those that are not finite are NaN."""

    def picture(self, place: Place, png: bytes) -> None:
        """Logs a picture, after the scalars of its iteration."""

    def close(self, failed: bool) -> None:
        """Called last."""


class TensorBoard:
    """Logs to DIR/tb/ synchronously; torch's writer uses a thread, whose errors are lost.

    Args:
        directory: DIR.

    Raises:
        UserError: tensorboard is not installed.
    """

    def __init__(self, directory: Path) -> None:
        try:
            import tensorboard.summary.writer.record_writer  # noqa: F401
        except ImportError:
            raise UserError("tensorboard is not installed: pip install tensorboard") from None
        self._directory = directory / "tb"
        self._file: FileIO | None = None

    def open(self) -> None:
        """The folder is created by the first write."""

    def rewind(self, last: int) -> None:
        self.close()  # its files cannot be truncated, but are cheap to rewrite
        files.remove(self._directory, folders.TENSORBOARD)

    def scalars(self, place: Place, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        tagged = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(place, Summary(value=tagged))

    def picture(self, place: Place, png: bytes) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # in the header chunk
        image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
        self._write(place, Summary(value=[Summary.Value(tag=f"{place.phase}/picture", image=image)]))

    def close(self, failed: bool = False) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, place: Place, summary: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        events = [Event(wall_time=time.time(), step=place.iteration, summary=summary)]
        with files.naming(self._directory):
            if self._file is None:
                self._directory.mkdir(exist_ok=True)
                name = f"events.out.tfevents.{time.time_ns()}"
                self._file = (self._directory / name).open("wb", buffering=0)
                events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
            writer = RecordWriter(self._file)
            for event in events:
                writer.write(event.SerializeToString())


class WeightsAndBiases:
    """Logs to a run of Weights & Biases, one for each DIR; WANDB_MODE etc. apply.

    Its steps are total iterations. Steps cannot be removed, so existing ones are not logged again; a resumed
    run repeats the same numbers. DIR/wandb.json keeps the run's id and the last step.

    Args:
        directory: DIR; wandb's files are in DIR/wandb/.
        project: project of the run.
        config: settings of the run.

    Raises:
        UserError: wandb is not installed, or fails in ``open``.
    """

    def __init__(self, directory: Path, project: str, config: Mapping[str, Any]) -> None:
        try:
            from wandb import init  # noqa: F401  (missing in a namespace package, such as a folder wandb/)
        except ImportError:
            raise UserError(
                f"wandb must be null unless wandb is installed, got {project!r}: pip install wandb"
            ) from None
        self._directory, self._project, self._config = directory, project, dict(config)
        self._known = directory / "wandb.json"
        self._run: Any = None
        self._new = False  # nothing was logged by earlier processes
        self._first = 0  # the first step to log
        self._last = -1  # the last step logged by this process

    def open(self) -> None:
        import wandb

        self._new = not self._known.is_file()
        known = self._recall()
        self._first = known["steps"]
        try:
            self._run = wandb.init(
                project=self._project,
                id=known["id"],
                name=self._directory.resolve().name,
                dir=str(self._directory),
                config=self._config,
                resume="allow",
                settings={"console": "off"},  # do not keep progress bars
            )
        except wandb.Error as error:
            raise UserError(f"wandb: {error}; WANDB_MODE=offline logs to this machine only") from error
        if self._run.resumed:  # the server knows its last step
            self._first = self._run.starting_step

    def rewind(self, last: int) -> None:
        known = self._recall()
        if not self._new:
            known["steps"] = max(known["steps"], last + 1)
            files.write_text(self._known, json.dumps(known) + "\n")
        self._new = False
        earlier = 0 if self._run.resumed else known["steps"]
        self._first = max(self._first, earlier, self._last + 1)

    def scalars(self, place: Place, values: Mapping[str, float]) -> None:
        if place.total >= self._first:
            self._run.log(dict(values), step=place.total)
            self._last = place.total

    def picture(self, place: Place, png: bytes) -> None:
        import wandb
        from PIL import Image

        if place.total >= self._first:
            image = wandb.Image(Image.open(io.BytesIO(png)))
            self._run.log({f"{place.phase}/picture": image}, step=place.total)

    def close(self, failed: bool = False) -> None:
        if self._run is not None:
            self._run.finish(exit_code=int(failed))

    def _recall(self) -> dict[str, Any]:
        known = files.read_json(self._known)
        if not isinstance(known.get("id"), str) or type(known.get("steps")) is not int:
            known = {"id": secrets.token_hex(4), "steps": 0}
            files.write_text(self._known, json.dumps(known) + "\n")
        return known
