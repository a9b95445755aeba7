#!/usr/bin/env bash
# Builds, tests, sanitizes and measures on this machine's GPU, without network, in under ten minutes: the
# last parts are cut off where the first took long.
#
#   benchmarks/gpu_report.sh [--rehearse] [--only PART]... [OUTPUT_DIR]     default: benchmarks/results
#
# JSON goes to OUTPUT_DIR/<device>-<date>-<benchmark>.json, a row as soon as it is measured, and all of it into one archive
# beside them. PYTHON names the interpreter (default: python3), UPSTREAM a checkout of the authors' code to compare with. The
# package is built into a temporary directory, and PYTHONPATH is searched behind it: the environment stays as it is. A
# failing part does not stop the others; --only runs the build and the parts named so, for a machine that ends a command
# before all are done.
#
# --rehearse runs every part at toy sizes on the CPU, with the kernels on the emulator of tests/simt: it shows that the script,
# the tests and the benchmarks work with the packages at hand. Nothing that it writes is a measurement; without OUTPUT_DIR
# it keeps nothing.
#
# Exit code: 0 when every part passed, 1 when one failed, 2 without a GPU or where something that it needs is missing.
set -u

only=()
rehearsing=
while :; do
  case "${1:-}" in
    --rehearse) rehearsing=1 ;;
    --only)
      if [ -z "${2:-}" ]; then
        echo "gpu_report: --only needs the name of a part" >&2
        exit 2
      fi
      only+=("$2")
      shift
      ;;
    --*)
      echo "gpu_report: $1 is none of --rehearse and --only PART" >&2
      exit 2
      ;;
    *) break ;;
  esac
  shift
done

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
output=${1:-}

if ! command -v "$python" >/dev/null; then
  echo "gpu_report: no interpreter $python; set PYTHON" >&2
  exit 2
fi
case $python in
  */*) python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python") ;;  # below, the working directory is another
esac
if ! device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'); then
  echo "gpu_report: $python cannot import torch; set PYTHON to the interpreter that has it" >&2
  exit 2
fi
if [ -n "$rehearsing" ]; then
  device=rehearsal
elif [ -z "$device" ]; then
  echo "gpu_report: no GPU that the torch of $python can use" >&2
  exit 2
fi

needed=(pybind11 ninja setuptools pytest hypothesis numpy PIL pydantic yaml typer rich safetensors jinja2 matplotlib)
missing=$("$python" -c 'import importlib.util, sys; print(*(n for n in sys.argv[1:] if not importlib.util.find_spec(n)))' \
  "${needed[@]}")
if [ -n "$missing" ]; then
  echo "gpu_report: $python cannot import ${missing// /, }; install them, or put them on PYTHONPATH" >&2
  exit 2
fi

upstream=()
if [ -n "${UPSTREAM:-}" ]; then
  if ! UPSTREAM=$(cd "$UPSTREAM" 2>/dev/null && pwd); then
    echo "gpu_report: UPSTREAM must name a checkout of the authors' code" >&2
    exit 2
  fi
  upstream=(--upstream "$UPSTREAM")
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if [ -z "$output" ]; then
  output=${rehearsing:+$site/results}
  output=${output:-$root/benchmarks/results}
fi
mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
# The installed package is what gets tested: the working directory must not be the checkout.
cd "$site" || exit 1
export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
prefix=$output/$(printf '%s' "$device" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' '-')-$(date -u +%Y-%m-%d)

names=()
outcomes=()
failed=0

budget=585  # seconds for all parts together

# asked NAME: whether a part is to run.
asked() {
  local wanted
  [ "${#only[@]}" -gt 0 ] && [ "$1" != build ] || return 0
  for wanted in "${only[@]}"; do
    [ "$wanted" != "$1" ] || return 0
  done
  return 1
}

# part NAME SECONDS COMMAND...: runs it under a time limit, within the budget, and notes how it ended.
part() {
  local name=$1 limit=$2 started=$SECONDS status outcome=passed left=$((budget - SECONDS))
  shift 2
  asked "$name" || return 0
  [ "$limit" -le "$left" ] || limit=$((left > 1 ? left : 1))
  printf '\n=== %s\n' "$name"
  timeout --signal=INT --kill-after=10 "$limit" "$@"  # pytest that is interrupted still prints what failed
  status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    outcome="FAILED (over $limit s)"
  elif [ "$status" -ne 0 ]; then
    outcome="FAILED (exit code $status)"
  fi
  [ "$status" -eq 0 ] || failed=1
  names+=("$name")
  outcomes+=("$outcome, $((SECONDS - started)) s")
}

pip=("$python" -m pip install --quiet --no-build-isolation --no-deps --no-index --disable-pip-version-check --target "$site")
if [ -n "$rehearsing" ]; then
  export SIGNAL_REID_REHEARSAL=1  # tests of a GPU that the emulator can stand in for are run
  export TORCHDYNAMO_DISABLE=1    # a compiled step is as eager as the others: its options are rehearsed, not its compiler
  part build 80 bash -c 'simt=$1 site=$2; shift 2; "$@" && "$0" "$simt" "$site/signal_reid"' "$python" \
    "$root/tests/simt/build.py" "$site" env SIGNAL_REID_BUILD_CUDA=0 "${pip[@]}" "$root"
else
  # Sanitizers name lines of the sources; the binary is twice as large for it, so nobody else's has them.
  part build 80 env SIGNAL_REID_BUILD_CUDA=1 NVCC_APPEND_FLAGS=-lineinfo "${pip[@]}" "$root"
fi

part info 20 "$python" -m signal_reid info

# The operators alone, before anything that runs them among other kernels.
find_sanitizer() {
  local candidate
  for candidate in "$(command -v compute-sanitizer)" "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"; do
    if [ -x "$candidate" ]; then
      printf '%s' "$candidate"
      return
    fi
  done
  printf 'compute-sanitizer'  # its part then fails and says that it is not there
}

exercise=("$python" "$root/tests/gpu/exercise.py")
if [ -n "$rehearsing" ]; then
  part racecheck 26 "${exercise[@]}" --toy  # the emulator watches for races itself
else
  sanitizer=$(find_sanitizer)
  for tool in memcheck racecheck initcheck synccheck; do
    part "$tool" 26 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 "${exercise[@]}"
  done
fi

gpu_tests=()
while IFS= read -r file; do
  gpu_tests+=("$file")
done < <(grep -rlE 'mark\.gpu' "$root/tests" --include='test_*.py' | sort)
workers=()  # most of the time goes to compilers, which run on the host
if [ -z "$rehearsing" ] && "$python" -c 'import xdist' 2>/dev/null; then
  workers=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
fi
pytest=("$python" -m pytest -m gpu -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root"
  -o addopts='--import-mode=importlib -ra --strict-markers' "${workers[@]+"${workers[@]}"}" "${gpu_tests[@]}")
part tests 100 "${pytest[@]}" -k "not compile and not inductor and not graph"
part "tests of compiling" 120 "${pytest[@]}" -k "compile or inductor or graph"

# toy_options SUFFIX: what makes a benchmark small; the last of an option counts.
toy_options() {
  local few="--device cpu --batch 4 --runs 1 --warmup 0 --precision fp32"
  local narrow="--layers 1 --set model.backbone.width=48 model.backbone.heads=3 model.backbone.output_dim=32"
  case $1 in
    ops) few+=" --no-compile-ahead --ops select_tokens gramian_volume quick_gelu" ;;
    train_step_compiled) few+=" $narrow --options backbone compiled compiled-backbone" ;;  # graphs need a GPU
    train_step_rgbnt100) few+=" $narrow --batch 6 --check-batch 4 --no-memory" ;;
    train_step*) few+=" $narrow" ;;
    metrics) few+=" --items 60 --dimension 32 --large 20 200" ;;
    evaluation) few+=" $narrow --items 64 --batch 64" ;;
    dataloading) few+=" --identities 3 --images 4 --instances 2 --workers 0 1" ;;
  esac
  printf '%s' "$few"
}

# benchmark NAME SECONDS SCRIPT SUFFIX OPTION...: runs a benchmark that writes <prefix>-SUFFIX.json.
benchmark() {
  local name=$1 limit=$2 script=$3 suffix=$4 toy=()
  shift 4
  [ -z "$rehearsing" ] || read -ra toy <<<"$(toy_options "$suffix")"
  part "benchmark of the $name" "$limit" "$python" "$root/benchmarks/$script.py" "$@" --json "$prefix-$suffix.json" \
    "${upstream[@]+"${upstream[@]}"}" "${toy[@]+"${toy[@]}"}"
}

# What matters most comes first: the last parts get what is left of the budget.
benchmark "compiled step" 180 train_step train_step_compiled --batch 64 --precision bf16 --no-memory \
  --options backbone compiled compiled-backbone graphs
benchmark "operators" 150 ops ops --precision fp32 bf16 fp16 --compile-ahead
benchmark "modules" 40 modules modules --precision fp32 fp16 bf16
benchmark "step" 50 train_step train_step --batch 64 --precision fp32 fp16 bf16 --no-memory
benchmark "step of RGBNT100" 120 train_step train_step_rgbnt100 --config rgbnt100 --batch 128 --check-batch 16 \
  --precision bf16 --runs 3
benchmark "metrics" 35 metrics metrics --runs 3 --warmup 1 --no-reranking --large 2000 200000
benchmark "evaluation" 60 evaluation evaluation --precision fp32 bf16 --warmup 1
benchmark "loading" 30 dataloading dataloading --runs 2 --warmup 1 --workers 0 4

printf '\n=== summary: %s, %s s\n' "$device" "$SECONDS"
for i in "${!names[@]}"; do
  printf '%-32s %s\n' "${names[$i]}" "${outcomes[$i]}"
done
if compgen -G "$prefix-*.json" >/dev/null; then
  tar -C "$output" -czf "$prefix.tar.gz" $(cd "$output" && ls "$(basename "$prefix")"-*.json)
  printf 'results: %s-*.json, all of them in %s\n' "$prefix" "$prefix.tar.gz"
fi
if [ "${#names[@]}" -le 1 ] && [ "${#only[@]}" -gt 0 ]; then
  echo "gpu_report: no part is named ${only[*]}" >&2
  exit 2
fi
exit "$failed"
