#!/usr/bin/env bash
# Everything that only a GPU can show, in one go of under 9 minutes:   bash bench/gpu.sh OUT_DIR
#
# Builds in place with the machine's own nvcc, and uses whichever torch, triton and pytest its python3 has: nothing is installed or fetched. Each
# step has a limit, and what it wrote until then is kept; a step that fails does not stop the others. Leaves in OUT_DIR, seven files in all:
#
#   summary.md         the steps, and the tables
#   kernels-*.json     calls-*.json     generation-*.json        to be copied to bench/results/ and committed; then `python bench/readme.py`
#   plots.png
#   ncu.txt            Nsight Compute on the two main kernels, where it is there and may read the counters
#   log.txt            what everything printed: builds, tests, compute-sanitizer
set -uo pipefail
[ $# -eq 1 ] || { echo "usage: bash bench/gpu.sh OUT_DIR"; exit 2; }
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD:$PWD/python:$PWD/bench PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
last=$((SECONDS + 510)) # the report takes a few seconds more
: >"$out/log.txt"
printf '| step | result | seconds |\n| --- | --- | --- |\n' >"$out/summary.md"
failed=0

step() { # step NAME LIMIT COMMAND...
  local name=$1 limit=$2 began=$SECONDS result=ok status
  shift 2
  ((limit > last - SECONDS)) && limit=$((last - SECONDS))
  printf '\n==== %s\n' "$name" | tee -a "$out/log.txt"
  if ((limit < 5)); then
    result="left out, no time"
  else
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
    ((status == 124 || status == 137)) && result="cut off after $limit s"
    ((status != 0 && status != 124 && status != 137)) && result="failed, exit $status"
  fi
  [ "$result" = ok ] || failed=1
  printf '| %s | %s | %s |\n' "$name" "$result" $((SECONDS - began)) >>"$out/summary.md"
}

$python - <<'END' || exit 2
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device: this script measures one")
END
slug=$($python -c 'import machine; print(machine.slug(machine.describe("cuda")))') || exit 2
# Triton compiles its kernels one after the other in a process: several, where pytest-xdist is there.
parallel=$($python -c 'import xdist' 2>/dev/null && echo "-n 8")

step build 90 $python setup.py --quiet build_ext --inplace
step "what is installed" 30 $python -m es_kernels
# shellcheck disable=SC2086
step "tests/gpu, with compute-sanitizer" 150 $python -m pytest -q -p no:cacheprovider --tb=short $parallel tests/gpu --ignore tests/gpu/test_finetune.py
step kernels 150 $python bench/kernels.py --device cuda --out "$out" --seconds 110
step generation 120 $python bench/generation.py --device cuda --out "$out" --seconds 95
step calls 60 $python -m pytest -q -p no:cacheprovider --tb=short bench/calls.py --benchmark-columns=median --benchmark-json "$out/calls-$slug.json"
if command -v ncu >/dev/null; then
  step ncu 45 ncu --clock-control none --set detailed --kernel-name 'regex:perturb|update' --launch-skip 2 --launch-count 2 --log-file "$out/ncu.txt" $python bench/two_kernels.py
fi
# Last, for it compiles most: captured graphs of a whole model, for every base.
# shellcheck disable=SC2086
step "tests/gpu, whole runs" 170 $python -m pytest -q -p no:cacheprovider --tb=short $parallel tests/gpu/test_finetune.py
last=$((SECONDS + 25))
step plots 20 $python bench/plots.py --results "$out" --one "$out/plots.png"
printf '\n' >>"$out/summary.md"
$python bench/readme.py --tables "$out" >>"$out/summary.md" 2>>"$out/log.txt" || failed=1
cat "$out/summary.md"
exit $failed
