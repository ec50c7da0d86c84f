"""Examples per second of both training stages, beside the same steps in PyTorch, on the shipped model.

    cargo build --release
    pip install torch diffusers
    python weights/benches/against_pytorch.py [--steps 6] [--rounds 3] [--device cpu] [--json FILE]

Both sides run in turn, `rounds` times, in f32 on the threads that the machine has: frozen or LoRA-tuned U-Net, the adapter
of `weights probe` (width 128), triplets, grounding, gradient clipping, AdamW. The medians of all rounds' steps count, without
the first step of each. Timed is the step on given latents and embeddings, without their encoding.
f32 means f32: PyTorch's TF32 convolutions are turned off.
"""
import argparse, copy, json, pathlib, statistics, subprocess, sys, tempfile, time

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import nn

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/parity"))
from dpt_reference import Adapter       # noqa: E402

MODEL = ROOT / "weights/shapes"
RANK, TAU = 4, 0.07


def synchronize(device):
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Stop(Exception):
    """Leaves the U-Net behind its middle block."""


class LoraLinear(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Step:
    """One optimiser step of a stage, with random data of the world's shapes."""

    def __init__(self, unet, stage, batch, device):
        self.unet, self.stage, self.batch, self.device = copy.deepcopy(unet), stage, batch, device
        self.unet.requires_grad_(False)
        lora = []
        if stage == "tune":
            for module in list(self.unet.modules()):
                for name in ("to_q", "to_k", "to_v") if hasattr(module, "to_q") and module.is_cross_attention else ():
                    setattr(module, name, LoraLinear(getattr(module, name)))
                if hasattr(module, "to_q") and module.is_cross_attention:
                    module.to_out[0] = LoraLinear(module.to_out[0])
            lora = [p for m in self.unet.modules() if isinstance(m, LoraLinear) for p in (*m.down.parameters(), *m.up.parameters())]
        self.features = None
        self.stopping = True
        self.unet.mid_block.register_forward_hook(self.tap)
        self.adapter = Adapter(128, 128, 8, 256, 1, 1, 8, 12, 128, classes=1)
        self.semantic = nn.Linear(128, 128)
        self.adapter.to(device), self.semantic.to(device), self.unet.to(device)
        self.parameters = [*self.adapter.parameters(), *self.semantic.parameters(), *lora]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def tap(self, module, inputs, output):
        if self.stopping:
            self.features = output
            raise Stop

    def run_to_tap(self, z, t, text):
        self.stopping = True
        try:
            self.unet(z, t, text)
        except Stop:
            return self.features

    def __call__(self):
        b, on = self.batch, dict(device=self.device)
        z, noise, t = torch.randn(b, 4, 16, 16, **on), torch.randn(b, 4, 16, 16, **on), torch.randint(0, 1000, (b,), **on)
        text, pooled, boxes = torch.randn(6 * b, 16, 128, **on), torch.randn(6 * b, 128, **on), torch.rand(b, 4, **on) * 0.4 + 0.1
        synchronize(self.device)
        started = time.perf_counter()
        rows, times = z.repeat(6, 1, 1, 1), t.repeat(6)
        with torch.set_grad_enabled(self.stage == "tune"):
            features = self.run_to_tap(rows, times, text)
        queries = self.adapter.queries(features, times)[-1]
        h = self.adapter.map_to_clip(queries[:5 * b, :self.adapter.m])
        s = (F.normalize(h, dim=-1) * F.normalize(pooled[:5 * b], dim=-1)[:, None]).sum(-1).amax(-1).view(5, b)
        logits, first = s * self.adapter.logit_scale.exp(), torch.zeros(b, dtype=torch.long, **on)
        matching = F.cross_entropy(logits[[0, 3, 4]].t(), first) + F.cross_entropy(logits[:3].t(), first)
        loss = matching + self.grounding(queries[5 * b:], boxes, pooled[5 * b:])
        if self.stage == "tune":
            self.stopping = False
            loss = loss + F.mse_loss(self.unet(z, t, text[:b]).sample, noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        synchronize(self.device)
        return time.perf_counter() - started

    def grounding(self, queries, truth, expression):
        objects = queries[:, self.adapter.m:]
        logits, boxes = self.adapter.class_embed(objects)[..., 0], self.adapter.bbox_embed(objects).sigmoid()
        p = logits.sigmoid()
        l1 = (boxes - truth[:, None]).abs().sum(-1)
        giou = 1 - generalized_iou(boxes, truth[:, None])
        psi = (-p + l1 + giou).detach().argmin(-1)
        chosen = F.one_hot(psi, p.shape[1]).float()
        weight = chosen + 0.1 * (1 - chosen)
        presence = F.binary_cross_entropy_with_logits(logits, chosen, weight, reduction="sum") / weight.sum()
        cosines = (F.normalize(self.semantic(objects), dim=-1) * F.normalize(expression, dim=-1)[:, None]).sum(-1)
        pick = lambda values: (values * chosen).sum() / len(psi)
        return presence + 5 * pick(l1) + 2 * pick(giou) + F.cross_entropy(cosines / TAU, psi)


def generalized_iou(a, b):
    corners = lambda x: (x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2)
    (a0, a1), (b0, b1) = corners(a), corners(b)
    area = lambda low, high: (high - low).clamp(min=0).prod(-1)
    inter = area(torch.max(a0, b0), torch.min(a1, b1))
    union = area(a0, a1) + area(b0, b1) - inter
    hull = area(torch.min(a0, b0), torch.max(a1, b1))
    return inter / union - (hull - union) / hull


def ours(a, stage, batch, steps, folder, adapter):
    out = pathlib.Path(tempfile.mkdtemp(dir=folder))
    more = ["--adapter", adapter] if stage == "tune" else []
    subprocess.run([a.program.resolve(), stage, "--device", a.device, "--out", out, "--steps", str(steps + 1), "--batch", str(batch),
                    "--cache", folder / "latents", "--examples", str(batch), *more], check=True, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["seconds"] - row["data_seconds"] for row in rows[1:]], out


def device_name(device):
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--steps", type=int, default=6)
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--batch", type=int, nargs=2, default=(48, 16), metavar=("PROBE", "TUNE"))
    ap.add_argument("--device", default="cpu", help="cpu or cuda, for both sides")
    ap.add_argument("--program", type=pathlib.Path, default=ROOT / "target/release/weights")
    ap.add_argument("--json", type=pathlib.Path)
    a = ap.parse_args()
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_pretrained(MODEL / "unet").float().train(False)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        _, probed = ours(a, "probe", 4, 1, folder, None)
        for stage, batch in zip(("probe", "tune"), a.batch):
            times = dict(ours=[], pytorch=[])
            for _ in range(a.rounds):
                times["ours"] += ours(a, stage, batch, a.steps, folder, probed / "adapter.safetensors")[0]
                step = Step(unet, stage, batch, a.device)
                times["pytorch"] += [step() for _ in range(a.steps + 1)][1:]
            rates = {side: batch / statistics.median(values) for side, values in times.items()}
            results[stage] = dict(batch=batch, examples_per_second=rates, ratio=rates["ours"] / rates["pytorch"])
    print("| stage, batch | examples/s | PyTorch | ours / PyTorch |\n|---|---|---|---|")
    for stage, r in results.items():
        rates = r["examples_per_second"]
        print(f"| {stage}, {r['batch']} | {rates['ours']:.1f} | {rates['pytorch']:.1f} | {r['ratio']:.2f} |")
    if a.json:
        a.json.write_text(json.dumps(dict(torch=torch.__version__, device=device_name(a.device), threads=torch.get_num_threads(), results=results), indent=2))


if __name__ == "__main__":
    main()
