#!/usr/bin/env bash
# The tests that compare numbers, and the benchmarks, on a GPU: a driver, PyTorch for CUDA 13 (whose libraries the programs
# load too) and diffusers are all it needs.
#
#     tests/gpu/check.sh PROGRAMS RESULTS      # PROGRAMS by build.sh, from a checkout at the same path; 5 minutes
#
# RESULTS gets kernels.log, tests.log, python.log, what the benchmarks measured as JSON, and report.md. With ONLY_TESTS=1, no benchmarks.
set -uo pipefail
programs=$(cd "${1:?the folder of build.sh}" && pwd) || exit
mkdir -p "${2:?a folder for the results}"; results=$(cd "$2" && pwd) || exit
root=$(cd "$(dirname "$0")/../.." && pwd)
LD_LIBRARY_PATH=$(python3 -c 'import pathlib, torch; print(":".join(map(str, pathlib.Path(torch.__file__).parents[1].glob("nvidia/*/lib"))))')${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} || exit
export LD_LIBRARY_PATH
failed=0

"$programs/kernel-tests" --test-threads 1 layers::cuda replay::tests > "$results/kernels.log" 2>&1 || failed=1
export TEST_DEVICE=cuda PREBUILT=$programs
several=(); [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ] || several=(--skip several::)
(cd "$root/tests" && "$programs/cuda-tests" --test-threads 1 "${several[@]}") > "$results/tests.log" 2>&1 || failed=1
unset TEST_DEVICE PREBUILT
(cd "$root/host-api/python" && SAMPLER_HOOK_LIBRARY=$programs/libdpt_cuda.so python3 -m pytest -q -ra tests/test_cuda.py) \
  > "$results/python.log" 2>&1 || failed=1
{
  echo "$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader)"
  for log in kernels tests; do
    echo; echo "$log: $(grep -a 'test result' "$results/$log.log" | tail -n 1)"
    grep -aE '^test .* FAILED$' "$results/$log.log"
  done
  [ ${#several[@]} = 0 ] || { echo; echo "left out, for want of a second GPU: several::"; }
  echo; echo "python: $(tail -n 1 "$results/python.log")"
} > "$results/report.md"
[ -n "${ONLY_TESTS:-}" ] || for dtype in f16 f32; do
  python3 "$root/dpt-plugin/benches/against_pytorch.py" --device cuda --dtype $dtype --sizes 64 --batches 1 4 \
    --stopwatch "$programs/stopwatch" --json "$results/correction-$dtype.json" > "$results/correction-$dtype.md" || failed=1
  { echo; echo "## A corrected step, $dtype"; cat "$results/correction-$dtype.md"; } >> "$results/report.md"
done
[ -n "${ONLY_TESTS:-}" ] || for batch in 1 4; do
  echo; echo "## Kernels, f16"
  "$programs/kernel-bench" $batch || failed=1
done >> "$results/report.md"
[ -n "${ONLY_TESTS:-}" ] || {
  echo; echo "## Training, f32"
  python3 "$root/weights/benches/against_pytorch.py" --device cuda --program "$programs/weights" --json "$results/training.json" || failed=1
} >> "$results/report.md"
cat "$results/report.md"
exit $failed
