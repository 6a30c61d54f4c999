"""The parts of `benchmarks/gpu_check.sh` that run on a CPU: its main job, without the libraries that a GPU
machine may lack, and the record of results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MISSING = ("yaml", "ot", "sklearn", "scipy", "matplotlib", "diffusers", "tensorboard", "PIL")


def run(*command: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_main_job_wants_no_library_of_config_metrics_or_images(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    pytest.importorskip("tqdm")
    script, numbers = BENCHMARKS / "main_job.py", tmp_path / "main.json"
    few = ["--pretrain-iterations", "150", "--iterations", "20", "--samplings", "1"]
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({MISSING}))
sys.argv = {[str(script), "--device", "cpu", "--json", str(numbers), *few]}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    run(sys.executable, "-c", code)
    found = json.loads(numbers.read_text())
    assert not {"entropy_excess", "coverage"} & found.keys()  # these require scikit-learn
    assert found["iterations"] == 20 and found["seconds"].keys() == {"pretraining", "DxMI", "evaluation"}
    # The distance of untrained samples from the data is 1.6, that of fresh data .04.
    assert found["sliced_wasserstein_floor"] < found["sliced_wasserstein"] < 0.5
    assert 0 < found["auroc"] < 1


def test_results_of_a_second_call_join_those_of_the_first(tmp_path: Path) -> None:
    work, folder = tmp_path / "work", tmp_path / "results"
    work.mkdir()
    about = {"device": "A GPU", "capability": "9.0", "torch": "2.11.0+cu130", "CUDA of torch": "13.0"}
    about |= {"driver": "580", "nvcc": "13.0", "commit": "abc"}
    (work / "environment.json").write_text(json.dumps(about))

    def add(part: str, status: str, log: str, numbers: object = None) -> None:
        (work / f"{part}.log").write_text(log)
        if numbers is not None:
            (work / f"{part}.json").write_text(json.dumps(numbers))
        run(sys.executable, BENCHMARKS / "gpu_results.py", "add", folder, work, part, status, 7)

    add("build", "passed", "")
    add("tests", "failed", "FAILED test_x\n1 failed, 5 passed\n")
    times = {"stats": {"median": 2e-6, "min": 1e-6}, "extra_info": {"implementation": "ours"}}
    add("iteration", "passed", "...", {"benchmarks": [{"group": "step", **times}]})
    add("main", "passed", "...", {"auroc": 0.9})
    add("tests", "passed", "line\n6 passed\n")  # the same part in another call
    (work / "ops.json").write_text('{"benchmarks": [')  # cut off
    add("ops", "stopped after 5 s", "...")

    json_file, text_file = sorted(folder.iterdir())
    assert json_file.name == "gpu_check-A-GPU-torch-2.11.0+cu130.json"
    record = json.loads(json_file.read_text())
    assert (record["device"], record["torch"], record["CUDA of torch"]) == ("A GPU", "2.11.0+cu130", "13.0")
    parts = record["parts"]
    assert parts["ops"].pop("status") == "stopped after 5 s" and "numbers" not in parts.pop("ops")
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(
        ("build", "tests", "iteration", "main"), "passed"
    )
    assert parts["tests"]["detail"] == ["6 passed"] and parts["tests"]["driver"] == "580"
    assert parts["main"]["numbers"] == {"auroc": 0.9}
    assert parts["iteration"]["numbers"][0]["median"] == 2e-6
    text = text_file.read_text()
    assert all(line in text for line in ("device: A GPU", "tests: passed (7 s", "auroc: 0.9", "2.0 us"))
