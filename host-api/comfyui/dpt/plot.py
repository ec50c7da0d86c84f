"""Score curves as a picture."""

import math

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .report import Report

_COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2"]
_INK, _GRID = "#333333", "#dddddd"
_LEGEND = 10
"""Most curves that are named."""


def draw(report: Report, width: int, height: int) -> torch.Tensor:
    """The scores of a run over its steps, `[1, height, width, 3]` in [0, 1]. Rings mark corrected steps."""
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default()
    curves = report.curves()
    title = f"DPT score before each step's correction ({report.sampler}, {report.mode})"
    pen.text((10, 6), title, fill=_INK, font=font)
    if not curves:
        pen.text((10, height // 2), "no scores: sample first, or turn on monitor", fill=_INK, font=font)
        return _tensor(image)
    frame = _Frame(width, height, max(report.steps - 1, 1), [score for curve in curves.values() for _, score in curve])
    frame.axes(pen, font)
    corrected = {record.step for record in report.records if record.outcome == "corrected"}
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        points = [frame.at(step, score) for step, score in curve]
        pen.line(points, fill=colour, width=2, joint="curve")
        for (step, _), (x, y) in zip(curve, points, strict=True):
            if step in corrected:
                pen.ellipse((x - 3, y - 3, x + 3, y + 3), outline=colour, fill="white")
        if number < _LEGEND:
            pen.text((width - frame.right + 10, frame.top + 14 * number), f"item {name}", fill=colour, font=font)
    return _tensor(image)


class _Frame:
    """Where steps and scores are in the picture."""

    left, right, top, bottom = 48, 100, 24, 28

    def __init__(self, width: int, height: int, last_step: int, scores: list[float]) -> None:
        self.width, self.height, self.last_step = width, height, last_step
        low, high = min(scores), max(scores)
        margin = 0.05 * (high - low) or 0.05 * max(abs(high), 1e-3)
        self.low, self.high = low - margin, high + margin

    def at(self, step: float, score: float) -> tuple[float, float]:
        across, down = self.width - self.left - self.right, self.height - self.top - self.bottom
        x = self.left + across * step / self.last_step
        return x, self.top + down * (self.high - score) / (self.high - self.low)

    def axes(self, pen: ImageDraw.ImageDraw, font) -> None:
        for score in _ticks(self.low, self.high):
            start, end = self.at(0, score), self.at(self.last_step, score)
            pen.line((start, end), fill=_GRID)
            pen.text((4, start[1] - 6), f"{score:.3g}", fill=_INK, font=font)
        for step in sorted({round(tick) for tick in _ticks(0, self.last_step)}):
            x, y = self.at(step, self.low)
            pen.line((x, y, x, y + 4), fill=_INK)
            pen.text((x - 4, y + 8), str(step), fill=_INK, font=font)
        corners = [self.at(0, self.high), self.at(0, self.low), self.at(self.last_step, self.low)]
        pen.line(corners, fill=_INK)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers in a range, about five."""
    raw = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = math.ceil(low / step)
    return [step * number for number in range(first, math.floor(high / step) + 1)]


def _tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 255.0).unsqueeze(0)
