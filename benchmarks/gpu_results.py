"""The results of gpu_check.sh: a JSON file and its text, rewritten after every part. Imports torch only for
``environment``.

    python gpu_results.py environment DEVICE                     prints device and versions as JSON
    python gpu_results.py add FOLDER WORK PART STATUS SECONDS    adds WORK/PART.log and .json, prints the
                                                                 path of the text

The files are FOLDER/gpu_check-DEVICE-torch-VERSION.json and .txt. Parts of earlier calls are kept, except one
of the same name, which is replaced.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

TELLING = re.compile(r"\d+ (passed|failed|skipped)|SUMMARY|not supported|^FAILED|^ERROR")


def environment(device: str) -> dict[str, str]:
    """The device, drivers and versions; ``capability`` is empty for a CPU."""
    import torch

    cuda = device == "cuda"
    found = {
        "device": torch.cuda.get_device_name() if cuda else "CPU rehearsal",
        "capability": "{}.{}".format(*torch.cuda.get_device_capability()) if cuda else "",
        "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda or "",
        "nvcc": output("nvcc", "--version"),
        "commit": output("git", "describe", "--always", "--dirty"),
    }
    found["driver"] = found["driver"].split("\n")[0]
    found["nvcc"] = (re.findall(r"release ([\d.]+)", found["nvcc"]) or [""])[0]
    return found


def output(*command: str) -> str:
    """The output of a command; empty if it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def add(folder: Path, work: Path, name: str, status: str, seconds: int) -> Path:
    """Adds a part to the results; returns the path of their text."""
    about = json.loads((work / "environment.json").read_text(encoding="utf-8"))
    stem = re.sub(r"[^\w.+]+", "-", f"gpu_check-{about['device']}-torch-{about['torch']}")
    path = folder / f"{stem}.json"
    of_all = {key: about.pop(key) for key in ("device", "capability", "torch", "CUDA of torch")}
    record: dict[str, Any] = {**of_all, "parts": {}}
    if path.exists():
        record = json.loads(path.read_text(encoding="utf-8"))
    part = {"status": status, "seconds": seconds, "date": datetime.date.today().isoformat(), **about}
    part["detail"] = detail(work / f"{name}.log", failed=status == "failed")
    with contextlib.suppress(OSError, ValueError):  # absent, or cut off by the time limit
        part["numbers"] = compact(json.loads((work / f"{name}.json").read_text(encoding="utf-8")))
    record["parts"][name] = part
    folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=1))
    text = path.with_suffix(".txt")
    write(text, "\n".join(lines(record)))
    return text


def detail(log: Path, *, failed: bool) -> list[str]:
    """The most informative lines of a log; more of them after a failure."""
    text = log.read_text(encoding="utf-8", errors="replace")
    found = [line for line in text.splitlines() if line.strip()]
    telling = [line for line in found if TELLING.search(line)]
    return [*telling[-20:], *found[-20:]] if failed else (telling or found)[-8:]


def compact(numbers: dict[str, Any]) -> Any:
    """pytest-benchmark's record without its rounds; anything else unchanged."""
    if "benchmarks" not in numbers:
        return numbers
    return [
        {"group": b["group"], **b["extra_info"], "median": b["stats"]["median"], "min": b["stats"]["min"]}
        for b in numbers["benchmarks"]
    ]


def lines(record: dict[str, Any]) -> list[str]:
    """The results as text."""
    text = [f"{key}: {value}" for key, value in record.items() if key != "parts"]
    for name, part in record["parts"].items():
        about = {key: part[key] for key in ("date", "driver", "nvcc", "commit") if part[key]}
        text += ["", f"{name}: {part['status']} ({part['seconds']} s; {about})"]
        text += [f"    {line}" for line in part["detail"]]
        numbers = part.get("numbers", [])
        if isinstance(numbers, dict):
            text += [f"    {key}: {value}" for key, value in numbers.items()]
        else:
            text += [
                f"    {b['group']:60}  {b['implementation']:24} {b['median'] * 1e6:10.1f} us" for b in numbers
            ]
    return text


def write(path: Path, text: str) -> None:
    """Writes a file atomically, since the machine may be taken away at any time."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text + "\n", encoding="utf-8")
    os.replace(new, path)


if __name__ == "__main__":
    if sys.argv[1] == "environment":
        print(json.dumps(environment(sys.argv[2])))
    else:
        folder, work, name, status, seconds = sys.argv[2:]
        print(add(Path(folder), Path(work), name, status, int(seconds)))
