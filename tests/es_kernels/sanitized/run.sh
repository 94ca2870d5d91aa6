#!/usr/bin/env bash
# The C++ under sanitizers; what is compiled goes to build/.
#
#   run.sh PYTHON test          what `make test-sanitized` runs
#   run.sh PYTHON fuzz SECONDS  what `make fuzz` runs; what it finds goes to build/fuzz/, new inputs to build/fuzz/corpus
#   run.sh PYTHON keep          after it: adds to corpus.txt what reaches further, as few inputs as do
set -euo pipefail
# Sanitizers of older compilers fail where the kernel spreads a program's addresses widely (vm.mmap_rnd_bits=32). Without
# that they are the same in every run. A container may forbid it.
if [ -z "${FIXED_ADDRESSES:-}" ] && setarch -R true 2>/dev/null; then
  FIXED_ADDRESSES=1 exec setarch -R bash "$0" "$@"
fi
cd "$(dirname "$0")/../../.."
here=tests/es_kernels/sanitized
python=$1
export CXX=$PWD/$here/c++ ES_KERNELS_CUDA=0
# That memory cannot be had is an error that the library reports
export ASAN_OPTIONS=allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1

library() { # NAME: build/NAME/es_kernels/libes_cpu.so, by $SANITIZING
  "$python" setup.py --quiet build_ext --build-lib="build/$1" --build-temp="build/$1/temp" >/dev/null
}

program() { # SOURCE NAME FLAGS: build/NAME/SOURCE, with that library
  "$CXX" -std=c++17 -Wno-psabi -I csrc "$here/$1.cpp" "build/$2/es_kernels/libes_cpu.so" "${@:3}" -o "build/$2/$1"
}

unpack() { # FOLDER: corpus.txt as files
  local n=0 line
  while read -r line; do
    printf "$(sed 's/../\\x&/g' <<<"$line")" >"$1/kept-$n"
    ((++n))
  done <$here/corpus.txt
}

case $2 in
  test)
    export SANITIZING="g++ -fsanitize=thread"
    library thread
    program concurrent thread
    build/thread/concurrent

    export SANITIZING="g++ -fsanitize=address,undefined"
    library address
    program fuzz address -DES_REPLAY
    build/address/fuzz $here/corpus.txt

    # Python and torch leak on purpose. With malloc for its own memory too, Python's buffers have redzones. libstdc++
    # comes before torch's use of it, so that libasan finds the exceptions that it wraps.
    libraries=$(for name in asan.so ubsan.so stdc++.so.6; do g++ -print-file-name="lib$name"; done)
    LD_PRELOAD=$(echo $libraries) ASAN_OPTIONS=$ASAN_OPTIONS:detect_leaks=0 PYTHONMALLOC=malloc OMP_NUM_THREADS=1 \
      "$python" -m pytest -q -p tests.es_kernels.sanitized.plugin -n logical --maxprocesses 8 --dist worksteal \
      tests/es_kernels/test_{add_noise,fingerprint,low_rank,cuda_on_cpu}.py
    ;;
  fuzz)
    export SANITIZING="clang++ -fsanitize=address,undefined,fuzzer-no-link"
    library fuzz
    program fuzz fuzz -fsanitize=fuzzer
    mkdir -p build/fuzz/corpus
    unpack build/fuzz/corpus
    build/fuzz/fuzz -max_total_time="$3" -max_len=400 -artifact_prefix=build/fuzz/ -print_final_stats=1 build/fuzz/corpus
    ;;
  keep)
    rm -rf build/fuzz/kept && mkdir build/fuzz/kept
    unpack build/fuzz/kept
    build/fuzz/fuzz -merge=1 -use_counters=0 -max_len=160 build/fuzz/kept build/fuzz/corpus
    for file in build/fuzz/kept/*; do od -An -v -tx1 "$file" | tr -d ' \n' && echo; done | sort >$here/corpus.txt
    ;;
esac
