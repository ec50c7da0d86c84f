#!/usr/bin/env bash
# The tests of the CUDA kernels, and of all that computes with them, on a machine without a GPU: emulator/ takes the place of the
# driver, and runs the kernels, ours and candle's, compiled for the CPU from their sources.
#
#     tests/gpu/emulate.sh PROGRAMS [FILTER]      # PROGRAMS by build.sh, of the same sources; 10 minutes on 2 cores
#
# A C++ compiler, make and the CUDA 13 toolkit (CUDA_HOME: its headers, libcudart and libnvrtc) are all it needs. FILTER: a part of
# the tests' names. EMULATOR_SEED draws another order of blocks, warps and lanes (0: the natural one); EMULATOR_THREADS: how many
# blocks run at once.
set -euo pipefail
programs=$(cd "${1:?the folder of build.sh}" && pwd)
filter=${2:-}
: "${CUDA_HOME:?the CUDA 13 toolkit}"
cd "$(dirname "$0")/../.."
out=$PWD/target/emulator
mkdir -p "$out"
candle=$(cargo metadata --format-version 1 --locked | python3 -c '
import json, pathlib, sys
print(next(pathlib.Path(p["manifest_path"]).parent / "src" for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"))')
make --silent --jobs --directory tests/gpu/emulator OUT="$out" CUDA_HOME="$CUDA_HOME" CANDLES="$candle"

export LD_LIBRARY_PATH=$out:$CUDA_HOME/lib:$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export TEST_DEVICE=cuda PREBUILT=$programs
failed=0
"$programs/kernel-tests" --test-threads 1 layers::cuda${filter:+::tests::$filter} | tee "$out/kernels.log" || failed=1
# Work is done when it is asked for: no stream is ever found busy, which is what the test that is left out is about.
(cd tests && "$programs/cuda-tests" --test-threads 1 --skip work_is_in_the_order_of_the_hosts_stream $filter) | tee "$out/tests.log" || failed=1
grep -qE 'result: ok\. [1-9]' "$out/kernels.log" "$out/tests.log" || { echo "no test was run and passed"; failed=1; }
exit $failed
