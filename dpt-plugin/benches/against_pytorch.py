"""What a corrected step costs, ours beside PyTorch's, on a U-Net of Stable Diffusion 2.1's geometry with random weights.

    dpt-plugin/benches/against_pytorch.sh [--rounds 5] [--json FILE]

builds our side, installs torch and diffusers where nothing else uses them, and runs this; `--device cuda --dtype f16` measures on
a GPU, with a build for one (`--stopwatch`).

Guided prediction, the U-Net up to a tap, and the correction (Eq. 9: up to the tap, adapter, gradient down to the latents) in
turn on both sides, each in a process of its own, on the threads that the machine has; medians. `--quick` takes a U-Net a
hundredth of the size: it tells that the benchmark still runs, and nothing else.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys, tempfile

import torch
from diffusers import UNet2DConditionModel

ROOT = pathlib.Path(__file__).resolve().parents[2]
DTYPES = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)
SD21 = dict(sample_size=64, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024, use_linear_projection=True)
QUICK = dict(SD21, block_out_channels=(32, 64, 128, 128), attention_head_dim=(1, 2, 4, 4), cross_attention_dim=64)


class Side:
    """A process that answers each line with seconds."""

    def __init__(self, command, threads):
        count = {name: str(threads) for name in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, **count})

    def time(self, line):
        print(line, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.process.args[0]} ended at `{line}`")
        return float(answer)

    def peak_gb(self):
        """Of main memory."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1e6

    def device_gb(self):
        """Of the GPU's memory, as it is held now: both sides keep what they once took. None where nobody tells."""
        query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
        try:
            rows = subprocess.run(query, capture_output=True, text=True).stdout.splitlines()
            memory = dict(row.split(", ") for row in rows)
            return int(memory[str(self.process.pid)]) / 1e3
        except (OSError, KeyError, ValueError):
            return None


def measure(a, sides):
    # On a GPU a step is launched as a graph, or as it is done plainly.
    steps = ("correct",) if a.device == "cpu" else ("correct", "plain")
    pieces = ["guided", *(f"{what} {tap}" for tap in a.taps for what in ("features", *steps))]
    table = []
    for size in a.sizes:
        for batch in a.batches:
            times = {piece: {name: [] for name in sides} for piece in pieces}
            # The first warm up; on a GPU, the plugin's first step is done as it is, its second captured, its third replayed.
            warm = 1 if a.device == "cpu" else 3
            for turn in range(1 - warm, a.rounds + 1):
                for piece in pieces:
                    for name, side in sides.items():
                        seconds = side.time(f"{piece} {size} {batch}")
                        if turn > 0:
                            times[piece][name].append(seconds)
                print(f"{size}x{size}, batch {batch}: round {turn} of {a.rounds}", file=sys.stderr)
            medians = {piece: {name: statistics.median(values) for name, values in by.items()} for piece, by in times.items()}
            for piece, by in medians.items():
                table.append(dict(size=size, batch=batch, piece=piece, seconds=by, all_seconds=times[piece],
                                  of_pytorch={name: seconds / by["PyTorch"] for name, seconds in by.items()},
                                  of_guided={name: seconds / medians["guided"][name] for name, seconds in by.items()}))
    return table


def memory_to_tap(program, arguments, a):
    """GB of device memory that corrections take beside a host's model: the U-Net up to a tap, the adapter, what is computed."""
    held = {}
    for tap in a.taps:
        side = Side([program, *arguments, tap], a.threads)
        for _ in range(3):
            side.time(f"correct {tap} {a.sizes[0]} 1")
        held[tap] = side.device_gb()
        side.process.stdin.close()
        side.process.wait()
    return held


def markdown(record):
    names = list(record["table"][0]["seconds"])
    lines = ["| latents | piece | side | ms | of PyTorch's | of the guided |", "|---|---|---|---|---|---|"]
    for row in record["table"]:
        for name in names:
            lines.append(f"| {row['batch']} of {row['size']}x{row['size']} | {row['piece']} | {name} | {1000 * row['seconds'][name]:.1f} "
                         f"| {row['of_pytorch'][name]:.2f} | {row['of_guided'][name]:.2f} |")
    for kind, values in record["memory_gb"].items():
        known = [f"{name} {value:.2f}" for name, value in values.items() if value is not None]
        lines += ["", f"GB of {kind} memory: {', '.join(known) or 'not known'}"]
    return "\n".join(lines)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--device", default="cpu")
    ap.add_argument("--dtype", choices=DTYPES, default="f32")
    ap.add_argument("--sizes", type=int, nargs="+", default=[64, 32], help="of the latents")
    ap.add_argument("--batches", type=int, nargs="+", default=[1])
    ap.add_argument("--taps", nargs="+", default=["mid", "up1"])
    ap.add_argument("--rounds", type=int, default=5)
    ap.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    ap.add_argument("--stopwatch", type=pathlib.Path, nargs="+", default=[ROOT / "target/release/examples/stopwatch"],
                    help="our side, or several builds of it")
    ap.add_argument("--quick", action="store_true")
    ap.add_argument("--json", type=pathlib.Path)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        UNet2DConditionModel(**(QUICK if a.quick else SD21)).to(DTYPES[a.dtype]).save_pretrained(folder)
        arguments = [folder, a.device, a.dtype]
        theirs = pathlib.Path(__file__).with_name("pytorch_stopwatch.py")
        one = len(a.stopwatch) == 1
        commands = {program.name if one else str(program): [program, *arguments] for program in a.stopwatch}
        commands["PyTorch"] = [sys.executable, theirs, *arguments]
        sides = {name: Side(command, a.threads) for name, command in commands.items()}
        table = measure(a, sides)
        memory = {kind: {name: read(side) for name, side in sides.items()}
                  for kind, read in (("main", Side.peak_gb), ("device", Side.device_gb)) if kind == "main" or a.device != "cpu"}
        for side in sides.values():
            side.process.stdin.close()
            side.process.wait()
        if a.device != "cpu":
            memory["device, up to a tap,"] = memory_to_tap(a.stopwatch[0], arguments, a)
    device = a.device if a.device == "cpu" else torch.cuda.get_device_name(a.device)
    record = dict(torch=torch.__version__, device=device, dtype=a.dtype, threads=a.threads, memory_gb=memory, table=table)
    print(markdown(record))
    if a.json:
        a.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
