"""The text of a pipeline's run, as it goes through the pipeline's own encoder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InvalidDataError


class TextWatch:
    """Pooled embeddings of the prompts: the last hidden state at the end of text, whatever layer the U-Net gets."""

    def __init__(self) -> None:
        self.pooled: torch.Tensor | None = None
        """[B, D] of the batch that was encoded last; None when the caller gave embeddings in place of prompts."""

    def encode(self, pipe: Any, encode_prompt: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Calls `encode_prompt` and looks at what the text encoder makes of the prompts, which it encodes first."""
        seen: list[torch.Tensor] = []

        def look(_module: Any, given: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> None:
            if not seen:
                ids = given[0] if given else keywords["input_ids"]
                seen.append(_pool(output[0], ids, pipe.text_encoder.config.eos_token_id))

        self.pooled = None
        hook = pipe.text_encoder.register_forward_hook(look, with_kwargs=True)
        try:
            encoded = encode_prompt(*arguments, **named)
        finally:
            hook.remove()
        bound = inspect.signature(encode_prompt).bind(*arguments, **named).arguments
        if seen and bound.get("prompt_embeds") is None:
            # One picture after the other of each prompt, as the pipeline repeats its rows.
            self.pooled = seen[0].repeat_interleave(encoded[0].shape[0] // seen[0].shape[0], dim=0)
        return encoded


def _pool(hidden: torch.Tensor, ids: torch.Tensor, end: int) -> torch.Tensor:
    """Rows [B, D] of the last hidden state [B, S, D] at the first end of text; with the id 2, as old folders have it,
    at the largest id.
    """
    is_end = ids == (ids.max(dim=1, keepdim=True).values if end == 2 else end)
    if not bool(is_end.any(dim=1).all()):
        raise InvalidDataError(f"a prompt has no end-of-text token {end}")
    positions = is_end.int().argmax(dim=1).to(hidden.device)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), positions]
