#!/usr/bin/env bash
# Everything in RESULTS.md from nothing: both stages, each loss alone, each tap, and what all of them bring.
#
#     cargo build --release
#     weights/shapes/experiments.sh FOLDER [DEVICE]        # half an hour on a large GPU, half a day on 2 cores
#
# Tables, JSON and plots go to FOLDER/results, runs to FOLDER. What FOLDER has is not made again, and a training run that was
# interrupted after its first save is resumed. WEIGHTS names another build of the program than target/release/weights.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weights=$(realpath "${WEIGHTS:-$here/../../target/release/weights}")
device=${2:-cpu}
mkdir -p "${1:?the folder to work in}/results"
cd "$1"

# NAME COMMAND..: a training run.
train() {
  [ -f "$1/curves.png" ] && return
  echo "== $*"
  "$weights" "${@:2}" --device "$device" --out "$1" --cache latents $([ -f "$1/state.safetensors" ] && echo --resume)
  # An interrupted run saves and is content: the next must not start from half of it.
  [ -f "$1/curves.png" ] || exit 130
}

# NAME COMMAND..: an evaluation; its table, numbers and plot.
evaluate() {
  [ -f "results/$1.md" ] && return
  echo "== $*"
  "$weights" eval "${@:2}" --device "$device" --json "results/$1.json" --plot "results/$1.png" | tee "results/$1.part"
  mv "results/$1.part" "results/$1.md"
}

adapter() { echo "--adapter $1/adapter.safetensors"; }
discriminate() { evaluate "discriminate-$1" discriminate $(adapter $1) --examples 384 --cache latents "${@:2}"; }
generate() { evaluate "generate-$1-$2" generate --split $2 --captions 192 $(adapter $1) "${@:3}"; }
timesteps=50,200,350,500,650,800,950

# What ships.
train stage1 probe --steps 2500 --examples 20000
tune=(tune $(adapter stage1) --layers all --steps 1600 --examples 20000)
train dpt "${tune[@]}" --grounding 0.1
train control "${tune[@]}" --matching 0 --grounding 0
for run in stage1 dpt; do discriminate $run --t $timesteps; done
for split in held-out train; do
  generate dpt $split --control control/adapter.safetensors --eta 0,1,4,8,16
  generate stage1 $split --eta 1,4,8,16
done

# Each loss alone, and each tap, from shorter runs on fewer scenes.
train short probe --steps 800 --examples 4096
tune=(tune $(adapter short) --layers all --steps 1000 --examples 4096)
train short-both "${tune[@]}"
train short-matching "${tune[@]}" --grounding 0
train short-grounding "${tune[@]}" --matching 0
train short-control "${tune[@]}" --matching 0 --grounding 0
discriminate short --t $timesteps
evaluate discriminate-baselines discriminate $(adapter short) --examples 96 --cache latents --baselines 4
for run in both matching grounding; do
  discriminate short-$run
  generate short-$run held-out --control short-control/adapter.safetensors --eta 0,8
done
generate short held-out --eta 1,4,8,16
evaluate generate-short-matching-fresh generate --split held-out --captions 576 --seed 3000000 \
  --control short-control/adapter.safetensors $(adapter short-matching) --eta 0
for tap in down0 down1 mid up0 up1; do
  train tap-$tap probe --tap $tap --steps 200 --batch 24 --examples 4096
  discriminate tap-$tap
  generate tap-$tap held-out --eta 1,8
done
