"""PyTorch's CUDA tensors through the Python door: where there is a GPU and the CUDA build of the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conftest import Case, load_safetensors, relative_error

import sampler_hook as sh

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
Make = Callable[..., sh.Plugin]


@pytest.fixture
def on_cuda(create: Make, case: Case) -> Make:
    """A plugin that computes on the GPU and is given latents there."""

    def make(host: sh.Host | None = None, **config: Any) -> sh.Plugin:
        try:
            plugin = create(host, device="cuda:0", **config)
        except sh.UnsupportedError as error:
            pytest.skip(str(error))
        plugin.prepare(case.model(), device="cuda:0")
        return plugin

    return make


def latents_of(case: Case, dtype: Any = torch.float32) -> Any:
    return torch.from_numpy(case.start).to("cuda", dtype)


def corrected(plugin: sh.Plugin, case: Case, latents: Any, out: Any = None, text: sh.Text | None = None) -> sh.Report:
    with plugin.run(batch=2, steps=case.steps, text=text or case.text()) as run:
        return run.step(case.step(), latents, out)


def test_in_place_is_what_pytorch_computes(on_cuda: Make, case: Case) -> None:
    plugin, latents = on_cuda(), latents_of(case)
    report = corrected(plugin, case, latents)
    gradient = (latents.cpu().numpy() - case.start) / case.settings["eta"]
    assert relative_error(gradient, case.first_gradient) < 1e-3
    assert [item.status for item in report.items] == [sh.Status.OK] * 2
    assert [item.score for item in report.items] == pytest.approx(case.tensors["scores.paper"][0].tolist(), abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_strides(on_cuda: Make, case: Case, dtype: Any) -> None:
    plugin = on_cuda()
    around = torch.zeros((4, 4, 16, 34), device="cuda", dtype=dtype)
    latents = around[1:3, :, :, 1:33:2]
    latents.copy_(latents_of(case, dtype))
    before, start = around.clone(), latents.float().cpu().numpy()
    corrected(plugin, case, latents)
    moved = latents.float().cpu().numpy() - start
    assert relative_error(moved, case.settings["eta"] * case.first_gradient) < 0.5 * float(torch.finfo(dtype).eps) * 300
    around[1:3, :, :, 1:33:2] = before[1:3, :, :, 1:33:2]
    assert torch.equal(around, before), "something beside the latents was written"


def test_the_order_of_a_stream_is_kept(on_cuda: Make, case: Case) -> None:
    """Latents that a busy stream has yet to write; what follows on it finds them corrected."""
    plugin, expected = on_cuda(), latents_of(case)
    corrected(plugin, case, expected)
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        source, latents = latents_of(case), torch.full(case.start.shape, torch.nan, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)  # a tenth of a second
            latents.copy_(source)
            corrected(plugin, case, latents)
            after = latents.clone()
            latents.zero_()
        torch.cuda.synchronize()
        assert torch.allclose(after, expected, atol=1e-4)


class Lent(sh.Weights):
    """A U-Net's tensors as PyTorch holds them on the GPU."""

    def __init__(self, tensors: dict[str, Any]) -> None:
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    def revision(self) -> int:
        return 1

    def tensor(self, name: str) -> Any:
        return self._tensors[name]


def test_weights_are_lent_on_the_device(on_cuda: Make, case: Case) -> None:
    stored = load_safetensors(case.model_path / "unet" / "diffusion_pytorch_model.safetensors")
    host = sh.Host()
    host.weights = Lent({name: torch.from_numpy(value).cuda() for name, value in stored.items()})
    plugin, own = on_cuda(host, gradient="weights"), on_cuda(lora_strength=0)
    # The text as the host's encoder gives it, on the device too.
    context = torch.linspace(-2, 2, 2 * 7 * 32, device="cuda").view(2, 7, 32).sin()
    text = sh.Text(context=context, pooled=context[:, 3])
    latents, expected = latents_of(case), latents_of(case)
    corrected(plugin, case, latents, text=text)
    corrected(own, case, expected, text=text)
    assert not torch.equal(latents, latents_of(case))
    assert torch.allclose(latents, expected, atol=1e-5)


def test_a_bad_item_stays_and_the_others_move(on_cuda: Make, case: Case) -> None:
    plugin, latents = on_cuda(), latents_of(case)
    latents[0, 1, 2, 3] = torch.inf
    before = latents.clone()
    report = corrected(plugin, case, latents)
    assert [item.status for item in report.items] == [sh.Status.NON_FINITE, sh.Status.OK]
    assert torch.equal(latents[0], before[0])
    assert not torch.equal(latents[1], before[1])


def test_main_memory_and_device_do_not_mix(on_cuda: Make, case: Case) -> None:
    plugin, latents = on_cuda(), latents_of(case)
    with pytest.raises((sh.InvalidArgumentError, sh.UnsupportedError)):
        corrected(plugin, case, latents, np.zeros_like(case.start))
    assert np.array_equal(latents.cpu().numpy(), case.start)


def test_two_hundred_steps_take_no_more_memory(on_cuda: Make, case: Case) -> None:
    plugin, latents = on_cuda(), latents_of(case)
    with plugin.run(batch=2, steps=case.steps, text=case.text()) as run:

        def free_after(steps: int) -> int:
            for _ in range(steps):
                run.step(case.step(), latents.clone())
            torch.cuda.synchronize()
            return int(torch.cuda.mem_get_info()[0])

        first = free_after(5)
        assert free_after(200) > first - 64 * 2**20


@pytest.mark.parametrize("gradient", ["host", "plugin", "weights"])
@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_a_pipeline_of_diffusers_on_the_gpu(
    library: sh.Library, case: Case, gradient: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole runs, with the adapter on either device, are PyTorch's on the CPU."""
    pytest.importorskip("diffusers")
    from pipelines import draw, pipeline

    from sampler_hook import diffusers as shd

    # By default PyTorch rounds what it convolves there to ten bits.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    pipe = pipeline(case).to("cuda")
    config = case.config(gradient="host", device=device)
    try:
        correction = shd.apply(pipe, config, gradient=gradient, library=library)
    except sh.UnsupportedError as error:
        pytest.skip(str(error))
    with correction:
        found = draw(pipe, case)
    assert relative_error(found, case.tensors["latents.paper"][-1]) < 1e-3
    assert relative_error(np.array(correction.scores), case.tensors["scores.paper"]) < 1e-3
