"""Hosts for tests: made-up features and gradients, and records of what a plugin says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import sampler_hook as sh


class Numbers(sh.Gradient):
    """Features and a gradient that are made up: what the plugin does with them is arithmetic."""

    def __init__(self) -> None:
        generator = np.random.default_rng(0)
        self.activation = generator.normal(size=(2, 32, 2, 2)).astype(np.float32)
        self.gradient = generator.normal(size=(2, 4, 16, 16)).astype(np.float32)
        self.seen: list[tuple[sh.Step, np.ndarray, str]] = []
        self.cotangent: np.ndarray | None = None
        self.lent: list[sh.Tensor] = []
        self.released = 0
        self.on_features: Callable[[], None] = lambda: None
        self.on_vjp: Callable[[], None] = lambda: None

    def features(self, step: sh.Step, latents: sh.Tensor, tap: str) -> sh.SupportsDLPack:
        self.seen.append((step, np.from_dlpack(latents), tap))
        self.lent.append(latents)
        self.on_features()
        return self.activation

    def vjp(self, cotangent: sh.Tensor) -> sh.SupportsDLPack:
        self.cotangent = np.from_dlpack(cotangent)
        self.lent.append(cotangent)
        self.on_vjp()
        return self.gradient

    def release(self) -> None:
        self.released += 1


class Recorder(sh.Host):
    def __init__(self, gradient: sh.Gradient | None = None, weights: sh.Weights | None = None) -> None:
        self.gradient, self.weights = gradient, weights
        self.messages: list[tuple[int, str]] = []
        self.tasks: list[tuple[str, int, int]] = []
        self.stop = False

    def log(self, level: int, message: str) -> None:
        self.messages.append((level, message))

    def cancelled(self) -> bool:
        return self.stop

    def progress(self, task: str, done: int, total: int) -> None:
        self.tasks.append((task, done, total))


def pooled_text() -> sh.Text:
    """Of two items of the tiny SD 1 model."""
    pooled = np.random.default_rng(1).normal(size=(2, 32)).astype(np.float32)
    return sh.Text(pooled=pooled)
