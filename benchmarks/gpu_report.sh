#!/usr/bin/env bash
# Builds, tests, sanitizes and measures everything on this machine's GPU, without network, in under ten minutes.
#
#   benchmarks/gpu_report.sh [OUTPUT_DIR]     default: benchmarks/results
#
# JSON goes to OUTPUT_DIR/<device>-<date>-<benchmark>.json. PYTHON names the interpreter (default: python3), UPSTREAM a
# checkout of the authors' code to compare with. The package is built into a temporary directory: the environment stays
# as it is, and needs torch, pybind11, ninja, setuptools and pytest. A failing part does not stop the others.
# Exit code: 0 when every part passed, 1 when one failed, 2 without a GPU.
set -u

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
output=${1:-$root/benchmarks/results}

if ! command -v "$python" >/dev/null; then
  echo "gpu_report: no interpreter $python; set PYTHON" >&2
  exit 2
fi
if ! device=$("$python" -c 'import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else "")'); then
  echo "gpu_report: $python cannot import torch; set PYTHON to the interpreter that has it" >&2
  exit 2
fi
if [ -z "$device" ]; then
  echo "gpu_report: no GPU that the torch of $python can use" >&2
  exit 2
fi

mkdir -p "$output" || exit 1
output=$(cd "$output" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
# The installed package is what gets tested: the working directory must not be the checkout.
cd "$site" || exit 1
export PYTHONPATH=$site PYTHONDONTWRITEBYTECODE=1
prefix=$output/$(printf '%s' "$device" | tr '[:upper:]' '[:lower:]' | tr -cs 'a-z0-9\n' '-')-$(date -u +%Y-%m-%d)
upstream=()
if [ -n "${UPSTREAM:-}" ]; then
  upstream=(--upstream "$UPSTREAM")
fi

names=()
outcomes=()
failed=0

budget=585  # seconds for all parts together

# part NAME SECONDS COMMAND...: runs it under a time limit, within the budget, and notes how it ended.
part() {
  local name=$1 limit=$2 started=$SECONDS status outcome=passed left=$((budget - SECONDS))
  shift 2
  [ "$limit" -le "$left" ] || limit=$((left > 1 ? left : 1))
  printf '\n=== %s\n' "$name"
  timeout --kill-after=5 "$limit" "$@"
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

part build 80 env SIGNAL_REID_BUILD_CUDA=1 "$python" -m pip install --quiet --no-build-isolation --no-deps \
  --no-index --disable-pip-version-check --target "$site" "$root"

part info 20 "$python" -m signal_reid.cli info

gpu_tests=()
while IFS= read -r file; do
  gpu_tests+=("$file")
done < <(grep -rlE 'mark\.gpu' "$root/tests" --include='test_*.py' | sort)
part tests 100 "$python" -m pytest -m gpu -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root" \
  -o addopts='--import-mode=importlib -ra --strict-markers' "${gpu_tests[@]}"

sanitizer=$(find_sanitizer)
for tool in memcheck racecheck initcheck synccheck; do
  part "$tool" 26 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --error-exitcode 1 \
    "$python" "$root/tests/gpu/exercise.py"
done

part "benchmark of the operators" 110 "$python" "$root/benchmarks/ops.py" --precision fp32 fp16 bf16 \
  --json "$prefix-ops.json" "${upstream[@]+"${upstream[@]}"}"
part "benchmark of the modules" 40 "$python" "$root/benchmarks/modules.py" --precision fp32 fp16 bf16 \
  --json "$prefix-modules.json" "${upstream[@]+"${upstream[@]}"}"
part "benchmark of the step" 75 "$python" "$root/benchmarks/train_step.py" --batch 64 --precision fp32 fp16 bf16 \
  --options backbone --json "$prefix-train_step.json" "${upstream[@]+"${upstream[@]}"}"
part "benchmark of the evaluation" 35 "$python" "$root/benchmarks/evaluation.py" --runs 3 --warmup 1 --no-reranking \
  --large 2000 200000 --json "$prefix-evaluation.json" "${upstream[@]+"${upstream[@]}"}"
part "benchmark of the inference" 45 "$python" "$root/benchmarks/inference.py" --precision fp32 bf16 --warmup 1 \
  --json "$prefix-inference.json" "${upstream[@]+"${upstream[@]}"}"
part "benchmark of the loading" 30 "$python" "$root/benchmarks/dataloading.py" --runs 2 --warmup 1 --workers 0 4 \
  --json "$prefix-dataloading.json" "${upstream[@]+"${upstream[@]}"}"

part "benchmark of the compiled step" 120 "$python" "$root/benchmarks/train_step.py" --batch 64 --precision bf16 \
  --options compiled --no-memory --json "$prefix-train_step_compiled.json" "${upstream[@]+"${upstream[@]}"}"

printf '\n=== summary: %s, %s s\n' "$device" "$SECONDS"
for i in "${!names[@]}"; do
  printf '%-32s %s\n' "${names[$i]}" "${outcomes[$i]}"
done
printf 'results: %s-*.json\n' "$prefix"
exit "$failed"
