#!/usr/bin/env bash
# Checks dxmi_ext on this machine's GPU, in under 8 minutes and without a network.
#
#   benchmarks/gpu_check.sh [FOLDER] [PART ...]
#
#   FOLDER   of gpu_check-DEVICE-torch-VERSION.json and .txt (default benchmarks/results), which are written
#            after every part and keep the parts of earlier calls.
#   PART     part to run; default all, in the order of their importance:
#     build           dxmi_ext for the installed torch, in build/gpu_check; a build of the same files is reused.
#                     It always comes first
#     tests           the tests marked gpu
#     main            the 8 Gaussians by the Python API with cuda_graph=true: losses, SW, AUROC
#     iteration       whole iterations beside plain torch loops
#     step-float32    the roof and sampler_step beside its peers
#     step-bfloat16   the same in bfloat16
#     ops             all other ops
#     settings        iterations in other precisions and memory formats
#     memcheck        some of the tests under compute-sanitizer
#     racecheck
#     compile         training with torch.compile
#
# Each part has a time limit, at which it keeps what it has measured, and none begins when the 8 minutes are
# nearly over: it is then "not run", as is a part that the machine cannot do, with the reason. A second call
# names the missing parts:
#
#   benchmarks/gpu_check.sh benchmarks/results settings memcheck racecheck
#
# PYTHON=python3 names the interpreter. GPU_CHECK_DEVICE=cpu rehearses all this without a GPU, in small.
# Exits with 1 if a part failed, with 2 if there is nothing to check.
# shellcheck disable=SC2016,SC2317 # parts run in a bash of their own
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

parts=(build tests main iteration step-float32 step-bfloat16 ops settings memcheck racecheck compile)
declare -A limits=([build]=110 [tests]=110 [main]=80 [iteration]=70 [step-float32]=80 [step-bfloat16]=50 [ops]=50
  [settings]=50 [memcheck]=60 [racecheck]=60 [compile]=110)
budget=465 # seconds in total; the last part may take 15 more to stop

is_part() { [[ -v "limits[$1]" ]]; }
folder=benchmarks/results
if (($#)) && ! is_part "$1"; then
  folder=$1
  shift
fi
for name in "$@"; do
  is_part "$name" || { echo "gpu_check: PART must be one of ${parts[*]}, got '$name'" >&2 && exit 2; }
done
if (($#)); then
  wanted=(build)
  for name in "${parts[@]:1}"; do [[ " $* " == *" $name "* ]] && wanted+=("$name"); done
else
  wanted=("${parts[@]}")
fi

python=${PYTHON:-python3}
device=${GPU_CHECK_DEVICE:-cuda}
root=$PWD
folder=$(realpath -m "$folder")
site=$root/build/gpu_check
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PATH="$PATH:/usr/local/cuda/bin"
not_run=77 # exit status of a part that cannot run here; pytest's own end at 5
export python device root site work not_run

"$python" benchmarks/gpu_results.py environment "$device" >"$work/environment.json" 2>"$work/error" || {
  echo "gpu_check: $python has no torch that sees a CUDA device; there is nothing to check" >&2
  tail -n 1 "$work/error" >&2
  exit 2
}

# wants COMMAND: ends a part as not run if the command is missing.
wants() { command -v "$1" >/dev/null || { echo "no $1 on PATH" && exit "$not_run"; }; }

build() {
  local files
  files=$({
    cat "$work/environment.json"
    find csrc dxmi_ext CMakeLists.txt pyproject.toml -type f ! -name '*.pyc' ! -name '*.so' -print0 |
      sort -z | xargs -0 sha256sum
  } | sha256sum)
  if [[ $files == "$(cat "$site/built-from" 2>/dev/null)" ]]; then
    echo "reused: the same files have been built"
    exit 0
  fi
  if [[ $device == cuda ]]; then
    wants nvcc
    DXMI_CUDA=ON TORCH_CUDA_ARCH_LIST=$("$python" -c "import json; print(json.load(open('$work/environment.json'))['capability'])")
    export DXMI_CUDA TORCH_CUDA_ARCH_LIST # for this device only, to be quick
  fi
  rm -rf "$site"
  "$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --target "$site" . || exit 1
  # Without kernels the tests would be skipped, and so pass.
  local check="from dxmi_ext import _native, ops; exit('$device' == 'cuda' and _native.cuda_status() or 0)"
  (cd "$work" && "$python" -c "$check") || exit 1
  echo "$files" >"$site/built-from"
}

# From their own folder, since python -m puts the current one, with its unbuilt dxmi_ext, before the build. The
# kernels' tests first, in case the time does not suffice for all.
tests() { # EXPRESSION
  cd python_tests || exit 1
  "$python" -m pytest -q -p no:cacheprovider -m gpu -k "$1" test_cuda.py test_ops.py method/test_noise.py \
    test_ops_errors.py test_ops_transforms.py engine method/test_execution.py
}

main_job() {
  local options=(--device "$device" --json "$work/main.json")
  [[ $device == cpu ]] && options+=(--iterations 50 --pretrain-iterations 50 --samplings 1)
  "$python" benchmarks/main_job.py "${options[@]}" && exit 0
  [[ $device == cpu ]] && exit 1
  echo "with cuda_graph=true it failed; without:"
  "$python" benchmarks/main_job.py "${options[@]}" --no-graph
  exit 1
}

sanitizer() { # TOOL
  wants compute-sanitizer
  # Without torch's cache every tensor is an allocation, whose bounds the tool knows.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  cd python_tests || exit 1
  compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 99 \
    "$python" -m pytest -q -p no:cacheprovider -m gpu test_cuda.py test_ops.py \
    -k "(unaligned or nan or costs or energy or velocity_var) and not graph" # these need the cache
  local code=$?
  grep -qs "Device not supported" "$work/$1.log" && exit "$not_run"
  exit "$code"
}

benchmarks() { # PART EXPRESSION FILE...
  local part=$1 expression=$2
  shift 2
  "$python" -c "import pytest_benchmark" 2>/dev/null || { echo "$python has no pytest-benchmark" && exit "$not_run"; }
  cd benchmarks || exit 1
  "$python" -m pytest -q -p no:cacheprovider --benchmark-only --quick -k "$device and ($expression)" \
    --benchmark-json "$work/$part.json" "$@"
}

run_part() {
  case $1 in
    build) build ;;
    tests) tests "not (test_execution and compile)" ;; # compiling takes minutes
    compile) tests "test_execution and compile" ;;
    main) main_job ;;
    iteration) benchmarks "$1" "not settings" test_iteration.py ;;
    step-float32) benchmarks "$1" "roof or sampler_step and not bfloat16" test_roof.py test_ops.py ;;
    step-bfloat16) benchmarks "$1" "roof or sampler_step and bfloat16" test_roof.py test_ops.py ;;
    ops) benchmarks "$1" "not sampler_step" test_ops.py ;;
    settings) benchmarks "$1" "settings and not compiled" test_iteration.py ;;
    memcheck | racecheck) sanitizer "$1" ;;
  esac
}
export -f wants build tests main_job sanitizer benchmarks run_part

failures=0
for name in "${wanted[@]}"; do
  echo "=== $name ($SECONDS s)"
  limit=$((budget - SECONDS < limits[$name] ? budget - SECONDS : limits[$name]))
  start=$SECONDS
  if ((limit < 15)); then
    echo "no time is left in this call" | tee "$work/$name.log"
    status="not run"
  else
    # pytest ends on SIGINT with what it has; a shell in the background would ignore it.
    env --default-signal=INT timeout --signal=INT --kill-after=15 "$limit" \
      bash -c 'run_part "$1"' bash "$name" 2>&1 | tee "$work/$name.log"
    case ${PIPESTATUS[0]} in
      0) status=passed ;;
      "$not_run") status="not run" ;; # a command of ours that says why
      124 | 137) status="stopped after $limit s" ;;
      *) status=failed ;;
    esac
  fi
  text=$("$python" benchmarks/gpu_results.py add "$folder" "$work" "$name" "$status" $((SECONDS - start)))
  [[ $status == passed || $status == "not run" ]] || failures=1
  [[ $name == build && $status != passed ]] && failures=1 && break # nothing else can run
done
echo "=== done ($SECONDS s)"
cat "$text"
exit $failures
