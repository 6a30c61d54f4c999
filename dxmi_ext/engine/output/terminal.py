"""Standard output and error for any text, which may be closed early. Imports the standard library."""

from __future__ import annotations

import codecs
import io
import os
import sys

HUNG_UP = 141
"""Exit status after a closed output, as shells report SIGPIPE."""

_PLAIN = {"±": "+-", "…": "...", "–": "-", "×": "x"}  # noqa: RUF001


def accept_any_text() -> None:
    """Lets print write any text: characters missing in the terminal's encoding are replaced, and bytes of
    names that are not UTF-8 are kept."""
    codecs.register_error("dxmi_ext.plainer", _plainer)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="dxmi_ext.plainer")


def discard_rest() -> None:
    """Drops unwritten output, so that python does not fail on it at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _plainer(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):  # a stream that is read as well
        return codecs.lookup_error("surrogateescape")(error)
    text = error.object[error.start : error.end]
    return b"".join(map(_encoded, text)), error.end


def _encoded(sign: str) -> bytes:
    if "\udc80" <= sign <= "\udcff":  # a byte that os.fsdecode could not read
        return bytes([ord(sign) - 0xDC00])
    return _PLAIN.get(sign, "?").encode("ascii")
