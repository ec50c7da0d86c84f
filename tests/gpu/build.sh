#!/usr/bin/env bash
# Everything that check.sh runs on a machine with a GPU, built on one that needs none (nvcc and the CUDA 13 libraries to link).
#
#     tests/gpu/build.sh FOLDER
set -euo pipefail
folder=${1:?where the programs go}
mkdir -p "$folder"; folder=$(cd "$folder" && pwd)
cd "$(dirname "$0")/../.."
build() { cargo "$@" --release --workspace --features cuda --message-format=json-render-diagnostics; }
# The last executable of a kind and name among cargo's messages.
executable() { python3 -c '
import json, sys
found = [m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable") and m["target"]["kind"] == [sys.argv[1]] and m["target"]["name"] == sys.argv[2]]
print(found[-1])' "$@"; }

build build > "$folder/messages.json"
for program in weights host-demo; do cp "$(executable bin $program < "$folder/messages.json")" "$folder"; done
cp "$(dirname "$(executable bin weights < "$folder/messages.json")")/libdpt.so" "$folder/libdpt_cuda.so"
cp "$(build build --example stopwatch | executable example stopwatch)" "$folder"
cp "$(build build --bench cuda | executable bench cuda)" "$folder/kernel-bench"
cp "$(build test --test cuda --no-run | executable test cuda)" "$folder/cuda-tests"
cp "$(build test --lib --no-run | executable lib diffusion)" "$folder/kernel-tests"
rm "$folder/messages.json"
cd "$folder" && strip weights host-demo libdpt_cuda.so stopwatch kernel-bench cuda-tests kernel-tests
