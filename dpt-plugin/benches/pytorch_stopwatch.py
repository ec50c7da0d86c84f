"""What `examples/stopwatch.rs` times, by PyTorch and diffusers, asked and answering the same way. Keys and values of the text
are projected in every evaluation, as diffusers does; ours are once for a run, before its clock starts."""
import pathlib, sys, time

import torch
from diffusers import UNet2DConditionModel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests/parity"))
from dpt_reference import Adapter       # noqa: E402

DTYPES = dict(f32=torch.float32, f16=torch.float16, bf16=torch.bfloat16)
TOKENS, TIMESTEP = 77, 500


class Stop(Exception):
    """Leaves the U-Net behind the tap."""


class Stopwatch:
    def __init__(self, folder, device, dtype):
        torch.manual_seed(0)
        torch.backends.cudnn.allow_tf32 = False
        self.device, self.dtype = device, DTYPES[dtype]
        self.unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=self.dtype).to(device).requires_grad_(False)
        self.adapters = {}

    def block(self, tap):
        if tap == "mid":
            return self.unet.mid_block
        return getattr(self.unet, f"{tap[:-1]}_blocks")[int(tap[-1])]

    def adapter(self, tap, channels):
        if tap not in self.adapters:
            width = self.unet.config.cross_attention_dim
            self.adapters[tap] = Adapter(channels, 256, 8, 2048, 1, 1, 10, 100, width).to(self.device).requires_grad_(False)
        return self.adapters[tap]

    def features(self, tap, z, context):
        found = []

        def stop(module, inputs, output):
            found.append(output[0] if isinstance(output, tuple) else output)
            raise Stop

        hook = self.block(tap).register_forward_hook(stop)
        try:
            self.unet(z, TIMESTEP, context)
        except Stop:
            return found[0]
        finally:
            hook.remove()

    def time(self, line):
        *words, size, batch = line.split()
        what, tap = words[0], words[1] if len(words) > 1 else None
        rows = int(batch) * (2 if what == "guided" else 1)
        config = self.unet.config
        latents = torch.randn(rows, config.in_channels, int(size), int(size))
        context = torch.randn(rows, TOKENS, config.cross_attention_dim, dtype=self.dtype, device=self.device)
        pooled = torch.randn(rows, config.cross_attention_dim, device=self.device)
        self.synchronize()
        started = time.perf_counter()
        z = latents.to(self.device)
        if what in ("correct", "plain"):
            z.requires_grad_()
            features = self.features(tap, z.to(self.dtype), context).float()
            times = torch.full((rows,), TIMESTEP, device=self.device)
            score = self.adapter(tap, features.shape[1]).score(features, times, pooled)
            gradient, = torch.autograd.grad(score.sum(), z)
            latents + 0.5 * gradient.cpu()
        else:
            with torch.inference_mode():
                if what == "guided":
                    self.unet(z.to(self.dtype), TIMESTEP, context).sample.cpu()
                else:
                    self.features(tap, z.to(self.dtype), context)
        self.synchronize()
        return time.perf_counter() - started

    def synchronize(self):
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


if __name__ == "__main__":
    stopwatch = Stopwatch(*sys.argv[1:])
    for line in sys.stdin:
        print(stopwatch.time(line), flush=True)
