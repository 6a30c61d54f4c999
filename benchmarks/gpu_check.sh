#!/usr/bin/env bash
# Checks dxmi_ext on this machine's GPU, in under 9 minutes and without a network: builds it beside the installed
# torch, runs the tests marked gpu, some of them under compute-sanitizer, and the benchmarks of the ops.
#
#   benchmarks/gpu_check.sh [FOLDER]     PYTHON=python3 names the interpreter
#
# Writes gpu_check-DEVICE.json and .txt into FOLDER (default benchmarks/results). What the machine cannot do is
# "not run", with the reason, and the rest goes on. Exits 1 if a part failed, 2 if there is nothing to check.
set -uo pipefail
cd "$(dirname "$0")/.."
results=$(realpath -m "${1:-benchmarks/results}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH="$PATH:/usr/local/cuda/bin"

read -r capability device < <("$python" -c '
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability(), torch.cuda.get_device_name())') || {
  echo "gpu_check: $python has no torch that sees a CUDA device; there is nothing to check" >&2
  exit 2
}

# part NAME SECONDS COMMAND...: runs it with a time limit; keeps its log, status and time.
part() {
  local name=$1 limit=$2 log="$work/$1.log" start=$SECONDS status
  shift 2
  echo "=== $name"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$log"
  case ${PIPESTATUS[0]} in
    0) status=passed ;;
    3) status="not run" ;; # a command of ours that says why
    124 | 137) status="stopped after $limit s" ;;
    *) status=failed ;;
  esac
  printf '%s\t%s\t%s\n' "$name" "$status" "$((SECONDS - start))" >>"$work/parts"
}
# wants COMMAND REASON: ends a part as not run where the command is missing.
wants() { command -v "$1" >/dev/null || { echo "$2" && exit 3; }; }

build() {
  wants nvcc "no nvcc on PATH"
  export DXMI_CUDA=ON TORCH_CUDA_ARCH_LIST=$capability # this device's alone, to be quick
  "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$work/site" .
}
tests() { "$python" -m pytest -q -p no:cacheprovider -m gpu python_tests; }
sanitizer() { # TOOL
  wants compute-sanitizer "no compute-sanitizer on PATH"
  # Without torch's cache every tensor is an allocation, whose ends the tool knows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 99 \
    "$python" -m pytest -q -p no:cacheprovider -m gpu python_tests/test_cuda.py python_tests/test_ops.py \
    -k "(unaligned or nan or costs or energy or velocity_var) and not graph" # which need the cache
  local code=$?
  grep -qs "Device not supported" "$work/$1.log" && exit 3
  exit $code
}
benchmarks() { # NAME EXPRESSION: those that match; in several parts, so that one that is stopped loses its own alone
  "$python" -c "import pytest_benchmark" 2>/dev/null || { echo "$python has no pytest-benchmark" && exit 3; }
  cd benchmarks
  "$python" -m pytest -q -p no:cacheprovider test_roof.py test_ops.py test_iteration.py --benchmark-only --quick \
    -k "cuda and ($2)" --benchmark-json "$work/$1.json"
}
export -f build tests sanitizer benchmarks wants
export python work capability

part build 100 bash -c build
part tests 110 bash -c tests
part memcheck 60 bash -c "sanitizer memcheck"
part racecheck 50 bash -c "sanitizer racecheck"
part step-float32 90 bash -c "benchmarks step-float32 'roof or sampler_step and float32'"
part step-bfloat16 50 bash -c "benchmarks step-bfloat16 'roof or sampler_step and bfloat16'"
part others 60 bash -c "benchmarks others 'not roof and not sampler_step and not settings'"

mkdir -p "$results"
"$python" - "$work" "$results" "$device" <<'PYTHON'
import datetime, json, pathlib, re, subprocess, sys

import torch

work, results, device = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]


def output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


parts = []
for line in (work / "parts").read_text().splitlines():
    name, status, seconds = line.split("\t")
    lines = [text for text in (work / f"{name}.log").read_text(errors="replace").splitlines() if text.strip()]
    telling = [t for t in lines if re.search(r"\d+ (passed|failed|skipped)|SUMMARY|not supported|^FAILED|^ERROR", t)]
    detail = (telling or lines)[-8:] if status != "failed" else [*telling[-20:], *lines[-20:]]
    parts.append({"name": name, "status": status, "seconds": int(seconds), "detail": detail})
times = [b for path in sorted(work.glob("*.json")) for b in json.loads(path.read_text())["benchmarks"]]
record = {
    "date": datetime.date.today().isoformat(),
    "commit": output("git", "describe", "--always", "--dirty"),
    "device": device,
    "driver": output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0],
    "torch": torch.__version__,
    "CUDA of torch": torch.version.cuda,
    "nvcc": (re.findall(r"release ([\d.]+)", output("nvcc", "--version")) or [""])[0],
    "parts": parts,
    "benchmarks": [
        {"group": b["group"], **b["extra_info"], "median": b["stats"]["median"], "min": b["stats"]["min"]}
        for b in times
    ],
}
text = [f"{key}: {value}" for key, value in record.items() if key not in ("parts", "benchmarks")]
for p in parts:
    text += ["", f"{p['name']}: {p['status']} ({p['seconds']} s)", *(f"    {line}" for line in p["detail"])]
for b in record["benchmarks"]:
    text.append(f"{b['group']:60}  {b['implementation']:20} {b['median'] * 1e6:10.1f} us")
name = "gpu_check-" + re.sub(r"\W+", "-", device)
(results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
(results / f"{name}.txt").write_text("\n".join(text) + "\n")
print("\n".join(text))
sys.exit(any(p["status"] not in ("passed", "not run") for p in parts))
PYTHON
