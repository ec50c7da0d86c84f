#!/usr/bin/env bash
# The tests of the CUDA kernels, and of all that computes with them, on a machine without a GPU: emulator/ takes the place of the
# driver, cuBLAS and cuRAND, and runs the kernels, ours and candle's, compiled for the CPU from their sources.
#
#     tests/gpu/emulate.sh PROGRAMS [FILTER]      # PROGRAMS by build.sh, of the same sources
#
# It needs a C++ compiler, make and the CUDA 13 toolkit (CUDA_HOME: headers, libcudart, libnvrtc). FILTER is a part of the tests'
# names: `layers::cuda` for those of the kernels alone, half a minute on 2 cores, `replay` for those of graphs; a module of cuda-tests
# takes 1 to 9 minutes.
# EMULATOR_SEED draws another order of blocks, warps and lanes (0: the natural one); EMULATOR_THREADS: how many blocks run at once.
# EMULATOR_COUNTS=1 tells how many kernels, products, copies and allocations each program asked for.
#
# It finds wrong numbers, accesses outside allocations or not aligned, reads of what was never written, missing barriers and waits
# for copies, barriers that not all reach, launches that a driver refuses. It cannot show speed, bank conflicts, what lanes of a
# warp do between two instructions that join them, the rounding of the GPU's own functions, nor anything about streams: all work
# is done when it is asked for or, captured, when its graph is launched. There are two devices.
set -euo pipefail
programs=$(cd "${1:?the folder of build.sh}" && pwd)
filter=${2:-}
: "${CUDA_HOME:?the CUDA 13 toolkit}"
cd "$(dirname "$0")/../.."
out=$PWD/target/emulator
mkdir -p "$out"
candle=$(cargo metadata --format-version 1 --locked --features cuda | python3 -c '
import json, pathlib, sys
print(next(pathlib.Path(p["manifest_path"]).parent / "src" for p in json.load(sys.stdin)["packages"] if p["name"] == "candle-kernels"))')
make --silent --jobs --directory tests/gpu/emulator OUT="$out" CUDA_HOME="$CUDA_HOME" CANDLES="$candle"

export LD_LIBRARY_PATH=$out:$CUDA_HOME/lib:$CUDA_HOME/lib64${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export TEST_DEVICE=cuda PREBUILT=$programs
failed=0
case $filter in
  "") of_kernels="layers::cuda replay::tests" ;;
  layers::cuda* | replay*) of_kernels=$filter ;;
  *) of_kernels=layers::cuda::tests::$filter ;;
esac
# shellcheck disable=SC2086
"$programs/kernel-tests" --test-threads 1 $of_kernels 2>&1 | tee "$out/kernels.log" || failed=1
# Work is done when it is asked for: no stream is ever found busy, which the two tests that are left out begin with.
(cd tests && "$programs/cuda-tests" --test-threads 1 ${filter:+"$filter"} --skip work_is_in_the_order_of_the_hosts_stream \
  --skip a_plugin_that_computes_on_the_cpu_takes_them_in_order_too) 2>&1 | tee "$out/tests.log" || failed=1
grep -qaE 'result: ok\. [1-9]' "$out/kernels.log" "$out/tests.log" || { echo "no test was run and passed"; failed=1; }
exit $failed
