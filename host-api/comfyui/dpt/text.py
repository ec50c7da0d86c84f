"""The pooled text that the adapter compares with: the text encoder's last hidden state at the end-of-text token, after the final layer
norm and without projection.

A conditioning of ComfyUI's own does not say where that token is. For SD 1.x its `pooled_output` is that very row, which the context
proves; for SD 2.x it is projected from a layer that the context does not show. `encode` keeps the row beside the context.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

KEY = "dpt_text"
"""Where `encode` keeps its row in a conditioning's options."""
_TOLERANCE = 1e-4
_ADVICE = "encode the positive prompt with the node DPT Text Encode"


def pooled_of(context: torch.Tensor, options: Mapping[str, Any]) -> torch.Tensor:
    """The pooled text `[n, D]` of a conditioning: its context `[n, S, D]` and its options. Refuses where it would have to guess."""
    kept = options.get(KEY)
    if kept is not None:
        position = kept["end_of_text"]
        if position >= context.shape[1] or not _same(context[:, position], kept["row"]).all():
            raise ValueError(
                "the conditioning was changed after DPT Text Encode, so that its text is no longer known: connect the node's output, "
                "combined (Conditioning Combine) where there are several prompts, not averaged"
            )
        return kept["pooled"]
    pooled = options.get("pooled_output")
    if pooled is None or pooled.shape[-1] != context.shape[-1]:
        found = "no pooled output" if pooled is None else f"a pooled output of width {pooled.shape[-1]}"
        raise ValueError(
            f"the positive conditioning has {found} beside a context of width {context.shape[-1]}, so that the end-of-text token's row "
            f"is not known: {_ADVICE}"
        )
    rows = pooled.unsqueeze(1)
    if not _same(context, rows).any(dim=1).all():
        raise ValueError(
            "the positive conditioning's pooled output is not a row of its context (SD 2.x, clip skip and averaged prompts are like "
            f"that), so that the end-of-text token's row is not known: {_ADVICE}"
        )
    return pooled


def _same(rows: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Which rows `[..., D]` are the reference, to rounding. Nothing is a row of zeros."""
    reference = reference.to(rows)
    size = reference.norm(dim=-1)
    return ((rows - reference).norm(dim=-1) <= _TOLERANCE * size) & (size > 0)


def end_of_text(chunk: Sequence[tuple], end_token: int) -> int:
    """Position of the first end-of-text token of a chunk of ComfyUI's tokens, which are pairs of a token and its weight. Vectors of
    textual inversions stand where tokens do, one each."""
    for position, (token, *_) in enumerate(chunk):
        if not isinstance(token, torch.Tensor | dict) and token == end_token:
            return position
    raise ValueError(f"the tokens have no end-of-text token {end_token}")


def encode(clip: Any, text: str) -> list:
    """Conditioning as ComfyUI's CLIP Text Encode makes it, with the end-of-text row beside it.

    The first chunk's token counts where the text has more than one. The row is that of the encoder as the U-Net was trained with it,
    also where the clip skips more layers.
    """
    if clip is None:
        raise RuntimeError("clip is None: the checkpoint has no text encoder; load one with a CLIP loader")
    tokens = clip.tokenize(text)
    if len(tokens) != 1 or not set(tokens) <= {"l", "h"}:
        raise ValueError(f"DPT knows the text encoders of SD 1.x and SD 2.x; this clip's tokens are for {', '.join(sorted(tokens))}")
    [(name, chunks)] = tokens.items()
    encoder = getattr(clip.cond_stage_model, f"clip_{name}")
    position = end_of_text(chunks[0], encoder.special_tokens["end"])
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    unskipped = None
    if clip.layer_idx is not None:
        plain = clip.clone()
        plain.clip_layer(None)
        unskipped = plain.encode_from_tokens(tokens)[:, position]
    for context, options in conditioning:
        row = context[:, position]
        options[KEY] = {"end_of_text": position, "row": row, "pooled": row if unskipped is None else unskipped}
    return conditioning
