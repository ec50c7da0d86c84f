"""Which prompts are scored where, and which rows of ComfyUI's batches are corrected, against its documented interfaces."""

import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace

import pytest
import torch

from dpt.curves import Range
from dpt.evaluations import Evaluations
from dpt.prompts import active, blend
from dpt.report import Report
from dpt.run import Now, Settings
from dpt.sampling import Correction

Processed = namedtuple("Processed", "input_x mult conditioning area control patches uuid hooks")


@pytest.fixture(autouse=True)
def samplers(monkeypatch):
    """comfy.samplers.get_area_and_mult for conditionings of area, mask and strength."""

    def get_area_and_mult(conditioning, x, sigma):
        if sigma[0] > conditioning.get("timestep_start", float("inf")) or sigma[0] < conditioning.get("timestep_end", 0):
            return None
        area = conditioning.get("area")
        if area is not None:
            height, width, top, left = area
            x = x[..., top : top + height, left : left + width]
        mult = torch.ones_like(x) * conditioning.get("strength", 1.0)
        if "mask" in conditioning:
            mult = mult * conditioning["mask"]
        states = conditioning["model_conds"]["c_crossattn"].cond
        states = states.repeat(x.shape[0] // states.shape[0], 1, 1)
        found = {"c_crossattn": SimpleNamespace(cond=states)}
        return Processed(
            x,
            mult,
            found,
            area and list(area),
            conditioning.get("control"),
            None,
            conditioning["uuid"],
            conditioning.get("hooks"),
        )

    comfy, module = ModuleType("comfy"), ModuleType("comfy.samplers")
    module.get_area_and_mult, comfy.samplers = get_area_and_mult, module
    monkeypatch.setitem(sys.modules, "comfy", comfy)
    monkeypatch.setitem(sys.modules, "comfy.samplers", module)


def conditioning(number, batch=1, **more):
    states = torch.full((batch, 7, 3), float(number + 1)) + torch.arange(7.0).view(1, 7, 1)
    text = {
        "cross_attn": states,
        "pooled_output": states[:, 4],
        "model_conds": {"c_crossattn": SimpleNamespace(cond=states)},
    }
    return {**text, "uuid": f"uuid {number}", **more}


LATENTS = torch.zeros(2, 4, 6, 6)
SIGMA = torch.tensor([1.0, 1.0])


def test_a_prompt_over_all_latents_has_no_weight():
    [prompt] = active([conditioning(0, strength=0.3)], LATENTS, SIGMA)
    assert prompt.weight is None
    assert prompt.context.shape == (2, 7, 3)
    assert prompt.pooled.tolist() == [[5, 5, 5]] * 2


def test_texts_of_a_batch_are_repeated_as_comfyui_repeats_them():
    states = conditioning(0, batch=2)
    states["pooled_output"] = states["cross_attn"][:, 4] = torch.tensor([[1.0, 0, 0], [0, 1.0, 0]])
    [prompt] = active([states], torch.zeros(4, 4, 6, 6), SIGMA)
    assert prompt.pooled[:, 0].tolist() == [1, 0, 1, 0]


def test_prompts_are_active_within_their_time():
    positive = [conditioning(0, timestep_end=2.0), conditioning(1, timestep_start=2.0)]
    assert [prompt.number for prompt in active(positive, LATENTS, torch.tensor([3.0, 3.0]))] == [0]
    [prompt] = active(positive, LATENTS, SIGMA)
    assert (prompt.number, prompt.weight) == (1, None)


def test_corrections_are_blended_by_weight():
    positive = [conditioning(0, strength=3.0), conditioning(1, area=(6, 2, 0, 4)), conditioning(2, mask=torch.eye(6))]
    prompts = active(positive, LATENTS, SIGMA)
    corrected = [torch.full(prompt.weight.shape, value) for prompt, value in zip(prompts, (1.0, 5.0, 9.0), strict=True)]
    found = blend(LATENTS, prompts, corrected)
    # Left: 1 alone, with 9 on the diagonal; right: 1 and 5 by 3 to 1.
    assert found[0, 0, 0, 1] == pytest.approx(1.0)
    assert found[0, 0, 1, 1] == pytest.approx((3 * 1 + 9) / 4)
    assert found[1, 2, 0, 5] == pytest.approx((3 * 1 + 5) / 4)
    assert found[1, 3, 5, 5] == pytest.approx((3 * 1 + 5 + 9) / 5)


def test_what_no_prompt_covers_stays():
    positive = [conditioning(0, area=(6, 2, 0, 0)), conditioning(1, area=(6, 2, 0, 2), strength=0.0)]
    prompts = active(positive, LATENTS, SIGMA)
    found = blend(LATENTS, prompts, [torch.ones(2, 4, 6, 2)] * 2)
    assert found[..., :2].eq(1).all()
    assert found[..., 2:].eq(0).all()


def test_a_partner_of_a_negative_area_has_its_texts_owner():
    """ComfyUI makes it of the negative's options and the positive's text."""
    positive = conditioning(0)
    partner = {**conditioning(7, area=(3, 3, 0, 0)), "model_conds": positive["model_conds"]}
    prompts = active([positive, partner], LATENTS, SIGMA)
    assert prompts[1].pooled.tolist() == prompts[0].pooled.tolist() == [[5, 5, 5]] * 2
    assert prompts[0].key == prompts[1].key


def test_what_is_not_supported_is_named():
    replaced = conditioning(0)
    replaced["model_conds"] = {"c_crossattn": SimpleNamespace(cond=torch.ones(1, 7, 3))}
    for wrong, message in [
        (conditioning(0, default=True), "default conditionings"),
        (conditioning(0, hooks=object()), "conditionings with hooks"),
        (replaced, "replaced the text of positive conditioning 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            active([wrong], LATENTS, SIGMA)


class Run:
    """A run that adds 1 to what it corrects."""

    def __init__(self, positive, settings):
        self.guider, self.settings = SimpleNamespace(conds={"positive": positive}), settings
        self.now = Now(step=0, sigma=1.0, percent=0.5, eta=1.0, reason="")
        self.report, self.evaluations, self.seen = Report(), Evaluations([1.0, 0.0]), []

    def correct(self, now, prompt, latents, space, options, control):
        self.seen.append((prompt.number, space, tuple(latents.shape)))
        return latents + 1


def corrected_rows(positive, conds, batches):
    """Rows of the U-Net's input that the mode condition-only corrected, for batches of (kind, uuid)."""
    correction = Correction(None, Settings(Range(), condition_only=True))
    correction._run = run = Run(positive, correction.settings)
    found = []

    def unet(z, timesteps, context, y, control, options, **_more):
        found.extend(z.flatten(1).mean(dim=1).tolist())

    def evaluate(model, lists, x, sigma, options):
        for batch in batches:
            z = torch.zeros(2 * len(batch), 4, 6, 6)
            options = {
                "cond_or_uncond": [kind for kind, _ in batch],
                "uuids": [uuid for _, uuid in batch],
                "sigmas": sigma,
            }
            correction.diffusion_model(unet, z, None, None, None, None, options)

    correction.calc_cond_batch(evaluate, None, conds(positive), LATENTS, SIGMA, {})
    return found, run.seen


POSITIVE = [conditioning(0)]
NEGATIVE = [conditioning(5)]


@pytest.mark.parametrize(
    ("batches", "expected"),
    [
        ([[(0, "uuid 0"), (1, "uuid 5")]], [1, 1, 0, 0]),
        ([[(1, "uuid 5"), (0, "uuid 0")]], [0, 0, 1, 1]),
        ([[(1, "uuid 5")], [(0, "uuid 0")]], [0, 0, 1, 1]),
    ],
)
def test_condition_only_corrects_the_positive_rows_in_any_order(batches, expected):
    rows, seen = corrected_rows(POSITIVE, lambda positive: [positive, NEGATIVE], batches)
    assert rows == expected
    assert seen == [(0, "vp", (2, 4, 6, 6))]


def test_condition_only_knows_the_positive_list_wherever_a_guider_puts_it():
    """DualCFGGuider: negative, middle, positive."""
    batch = [(2, "uuid 0"), (1, "uuid 6"), (0, "uuid 5")]
    rows, _ = corrected_rows(POSITIVE, lambda positive: [NEGATIVE, [conditioning(6)], positive], [batch])
    assert rows == [1, 1, 0, 0, 0, 0]


def test_condition_only_knows_prompts_by_uuid():
    positive = [conditioning(0), conditioning(1)]
    _, seen = corrected_rows(positive, lambda given: [given, NEGATIVE], [[(0, "uuid 1"), (1, "uuid 5"), (0, "uuid 0")]])
    assert [number for number, *_ in seen] == [1, 0]


def test_an_evaluation_of_the_negative_list_alone_is_left_as_it_is():
    """Self-attention guidance evaluates it once more."""
    rows, seen = corrected_rows(POSITIVE, lambda positive: [NEGATIVE], [[(0, "uuid 5")]])
    assert (rows, seen) == ([0, 0], [])


def test_without_a_run_nothing_is_corrected():
    correction = Correction(None, Settings(Range(), condition_only=True))
    z = torch.zeros(2, 4, 6, 6)
    assert correction.diffusion_model(lambda given, *_: given, z, None) is z
    assert correction.calc_cond_batch(lambda *given: given[1], None, ["conds"], LATENTS, SIGMA, {}) == ["conds"]
