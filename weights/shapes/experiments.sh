#!/usr/bin/env bash
# Everything in RESULTS.md from nothing: both stages, each loss alone, each tap, and what all of them bring.
#
#     cargo build --release
#     weights/shapes/experiments.sh FOLDER        # some hours on 2 cores
#
# Tables, JSON and plots go to FOLDER/results, runs to FOLDER. What FOLDER has is not made again, and a training run that was
# interrupted after its first save is resumed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
weights=$here/../../target/release/weights
mkdir -p "${1:?the folder to work in}/results"
cd "$1"

# NAME COMMAND..: a training run.
train() {
  [ -f "$1/curves.png" ] && return
  echo "== $*"
  "$weights" "${@:2}" --out "$1" --cache latents $([ -f "$1/state.safetensors" ] && echo --resume)
  # An interrupted run saves and is content: the next must not start from half of it.
  [ -f "$1/curves.png" ] || exit 130
}

# NAME COMMAND..: an evaluation; its table, numbers and plot.
evaluate() {
  [ -f "results/$1.md" ] && return
  echo "== $*"
  "$weights" eval "${@:2}" --json "results/$1.json" --plot "results/$1.png" | tee "results/$1.part"
  mv "results/$1.part" "results/$1.md"
}

tune=(tune --adapter stage1/adapter.safetensors --layers all --steps 1000 --lr 5e-4 --denoising 200)
train stage1 probe
train dpt "${tune[@]}"
train control "${tune[@]}" --matching 0 --grounding 0
train matching "${tune[@]}" --grounding 0
train grounding "${tune[@]}" --matching 0

adapter() { echo "--adapter $1/adapter.safetensors"; }
timesteps=50,200,350,500,650,800,950
for run in stage1 dpt; do
  evaluate "discriminate-$run" discriminate $(adapter $run) --examples 384 --cache latents --t $timesteps
done
evaluate discriminate-baselines discriminate $(adapter stage1) --examples 96 --cache latents --baselines 4
for run in matching grounding; do
  evaluate "discriminate-$run" discriminate $(adapter $run) --examples 384 --cache latents
done

for split in held-out train; do
  evaluate "generate-$split" generate --split $split --captions 192 --control control/adapter.safetensors $(adapter dpt) --eta 0,1,4,8,16
  evaluate "generate-$split-stage1" generate --split $split --captions 192 $(adapter stage1) --eta 1,4,8,16
  evaluate "generate-$split-losses" generate --split $split --captions 192 $(adapter matching) $(adapter grounding) --eta 0,8
done

for tap in down0 down1 up0 up1; do
  train "stage1-$tap" probe --tap $tap --steps 200 --batch 24
  evaluate "discriminate-$tap" discriminate $(adapter stage1-$tap) --examples 384 --cache latents
  evaluate "generate-$tap" generate --split held-out --captions 96 $(adapter stage1-$tap) --eta 1,8
done
