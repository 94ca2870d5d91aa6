#!/usr/bin/env bash
# Everything that only a GPU can show, in one go of under 9 minutes:   bash bench/speed/gpu.sh OUT_DIR [STEP...]
#
# Builds in place with the machine's own nvcc, and uses whichever torch, triton and pytest its python3 has: nothing is installed or fetched. Needs no
# git: an archive of the sources will do. Each step has a limit, and is interrupted when it is over, so that it can write what it has; a step that
# fails does not stop the others. What there was no time for is named at the end: name these steps to run them alone, in another call.
#
#   summary.md         the steps, and the tables
#   kernels-*.json     calls-*.json     generation-*.json        copy them to bench/results/, run `python -m bench.publish.tables`, commit
#   plots.png
#   ncu.txt            Nsight Compute on the two main kernels, where it is there and may read the counters
#   log.txt            what everything printed: versions, builds, tests, compute-sanitizer
set -uo pipefail
every="versions build installed tests kernels generation calls sanitizer ncu runs plots"
[ $# -ge 1 ] || { echo "usage: bash bench/speed/gpu.sh OUT_DIR [STEP...]   steps: $every"; exit 2; }
folder=$1
shift
wanted=" ${*:-$every} "
for name in $wanted; do
  [[ " $every " == *" $name "* ]] || { echo "there is no step $name; there are $every"; exit 2; }
done
mkdir -p "$folder" || exit 2
out=$(cd "$folder" && pwd)
cd "$(dirname "$0")/../.." || exit
export PYTHONPATH=$PWD:$PWD/python PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
last=$((SECONDS + 510)) # the report takes a few seconds more
: >"$out/log.txt"
printf '| step | result | seconds |\n| --- | --- | --- |\n' >"$out/summary.md"
failed=0
left=""

step() { # step NAME LIMIT COMMAND...
  local name=$1 limit=$2 began=$SECONDS result=ok status
  shift 2
  [[ $wanted == *" $name "* ]] || return
  ((limit > last - SECONDS)) && limit=$((last - SECONDS))
  printf '\n==== %s\n' "$name" | tee -a "$out/log.txt"
  if ((limit < 5)); then
    result="left out, no time"
    left+=" $name"
  else
    # Where this script runs in the background, interrupts are ignored: not by a step.
    timeout --signal=INT --kill-after=10 "$limit" env --default-signal=INT "$@" 2>&1 | tee -a "$out/log.txt"
    status=${PIPESTATUS[0]}
    ((status == 124 || status == 137)) && result="cut off after $limit s"
    ((status != 0 && status != 124 && status != 137)) && result="failed, exit $status"
  fi
  [ "$result" = ok ] || failed=1
  printf '| %s | %s | %s |\n' "$name" "$result" $((SECONDS - began)) >>"$out/summary.md"
}

slug=$($python - <<'END'
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch sees no CUDA device: this script measures one")
from bench.common import environment
print(environment.slug(environment.describe("cuda")))
END
) || exit 2
pytest="$python -m pytest -v -p no:cacheprovider --tb=short"
# Triton compiles its kernels one after the other in a process: several, where pytest-xdist is there.
parallel=$($python -c 'import xdist' 2>/dev/null && echo "-n 8")

describe='import json; from bench.common import environment; print(json.dumps(environment.describe("cuda"), indent=1))'
step versions 30 bash -c "$python -c '$describe'; nvcc --version | tail -n 2; nvidia-smi || true"
step build 90 $python setup.py --quiet build_ext --inplace
# 13 Triton kernels, of some seconds each, are compiled here; the steps after it find them in Triton's cache.
step installed 90 $python -m es_kernels
# shellcheck disable=SC2086
step tests 120 $pytest $parallel -m gpu tests/gpu --ignore tests/gpu/test_finetune.py --ignore tests/gpu/test_sanitizer.py
step kernels 160 $python -m bench.speed.kernels --device cuda --out "$out" --seconds 120
step generation 120 $python -m bench.speed.generation --device cuda --out "$out" --seconds 95
step calls 60 $pytest bench/speed/bench_calls.py --benchmark-columns=median --benchmark-json "$out/calls-$slug.json"
# shellcheck disable=SC2086
step sanitizer 150 $pytest $parallel -m gpu tests/gpu/test_sanitizer.py
if command -v ncu >/dev/null; then
  step ncu 45 ncu --clock-control none --set detailed --kernel-name 'regex:perturb|update' --launch-skip 2 --launch-count 2 --log-file "$out/ncu.txt" $python -m bench.speed.profile_target
fi
# Last, for it compiles most: captured graphs of a whole model, for every base.
# shellcheck disable=SC2086
step runs 170 $pytest $parallel -m gpu tests/gpu/test_finetune.py
last=$((SECONDS + 25))
step plots 20 $python -m bench.publish.plots --results "$out" --one "$out/plots.png"
[ -z "$left" ] || printf '\nThere was no time for%s. Run them alone: bash bench/speed/gpu.sh %s%s\n' "$left" "$folder" "$left" >>"$out/summary.md"
printf '\n' >>"$out/summary.md"
$python -m bench.publish.tables --tables "$out" >>"$out/summary.md" 2>>"$out/log.txt" || failed=1
cat "$out/summary.md"
exit $failed
