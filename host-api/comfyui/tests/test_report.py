import json
import math

import torch

from dpt.nodes import plot
from dpt.plot import draw
from dpt.report import Item, Record, Report


def record(step, outcome, *scores, prompt=0):
    items = tuple(Item(score, 1.0, 0.5, "OK") for score in scores)
    return Record(step, 2.0, 500.0, 0.5, 1.0, prompt, outcome, 0.1, items)


def report(*records, steps=4):
    found = Report()
    found.start("euler", steps, "paper")
    found.records.extend(records)
    return found


def test_curves_are_by_item_and_leave_out_what_was_not_computed():
    found = report(record(0, "corrected", 0.1, 0.2), record(1, "eta is 0"), record(2, "corrected", 0.3, math.nan))
    assert found.curves() == {"0": [(0, 0.1), (2, 0.3)], "1": [(0, 0.2)]}
    assert found.corrected == 2


def test_several_prompts_have_curves_of_their_own():
    found = report(record(0, "corrected", 0.1), record(0, "corrected", 0.2, prompt=1))
    assert found.curves() == {"0, prompt 0": [(0, 0.1)], "0, prompt 1": [(0, 0.2)]}
    assert found.corrected == 1


def test_json_has_all_of_it_and_null_for_nan():
    found = json.loads(report(record(0, "corrected", math.nan)).to_json())
    assert (found["sampler"], found["steps"], found["mode"]) == ("euler", 4, "paper")
    assert found["records"][0]["items"] == [{"score": None, "gradient_norm": 1.0, "correction_norm": 0.5, "status": "OK"}]
    assert (found["records"][0]["timestep"], found["records"][0]["outcome"]) == (500.0, "corrected")


def test_a_run_forgets_the_one_before():
    found = report(record(0, "corrected", 0.1))
    found.start("heun", 7, "condition-only")
    assert (found.records, found.steps, found.sampler, found.corrected) == ([], 7, "heun", 0)


def test_the_plot_is_an_image_of_comfyuis():
    image, text = plot(report(record(0, "corrected", 0.1), record(3, "corrected", 0.4)), None, 400, 200)
    assert image.shape == (1, 200, 400, 3)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) < 0.5 < float(image.max()) == 1
    assert json.loads(text)["steps"] == 4


def coloured(image, colour):
    """Rows and columns of pixels of a colour."""
    wanted = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return torch.nonzero((image[0] - wanted).abs().sum(dim=-1) < 0.02)


def test_a_rising_curve_rises():
    image = draw(report(record(0, "skipped", 0.1), record(3, "skipped", 0.4)), 400, 200)
    pixels = coloured(image[:, :, :300], "#1f77b4")
    left, right = pixels[pixels[:, 1].argmin()], pixels[pixels[:, 1].argmax()]
    assert left[0] > right[0] + 80
    assert (int(left[1]), int(right[1])) == (48, 299)


def test_corrected_steps_are_ringed():
    line = draw(report(record(0, "skipped", 0.1), record(3, "skipped", 0.1)), 400, 200)
    rings = draw(report(record(0, "corrected", 0.1), record(3, "corrected", 0.1)), 400, 200)
    height = [int(pixels[:, 0].max() - pixels[:, 0].min()) for pixels in (coloured(i[:, :, :300], "#1f77b4") for i in (line, rings))]
    assert height[0] <= 2
    assert height[1] >= 5


def test_runs_with_one_score_or_none():
    assert draw(report(), 300, 150).shape == (1, 150, 300, 3)
    assert draw(report(record(0, "corrected", 0.0), steps=1), 300, 150).shape == (1, 150, 300, 3)
