"""Conditionings of ComfyUI's text encoders, against what PyTorch recorded (tests/parity)."""

import json
import os

import pytest
import torch

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH names no checkout of ComfyUI", allow_module_level=True)

import tiny
from nodes import CLIPSetLastLayer, CLIPTextEncode, ConditioningAverage, ConditioningConcat
from safetensors.torch import load_file
from tiny import Tiny, relative

from dpt.text import KEY, encode, end_of_text, pooled_of

MODELS = pytest.mark.parametrize("model", [Tiny("sd1"), Tiny("sd2")], ids=["sd1", "sd2"])
LONG = 8
"""Number of the prompt in text.json that is longer than the encoder."""


def prompts(model):
    """Prompts with their recorded states `[77, D]` and pooled texts `[D]`, but for those that are cut there and chunked by ComfyUI."""
    recorded = load_file(model.cases / "text.safetensors")
    texts = json.loads((model.cases / "text.json").read_text())
    tokens = tiny.clip(model)
    for text, hidden, pooled in zip(texts, recorded["hidden"], recorded["pooled"], strict=True):
        [chunks] = tokens.tokenize(text).values()
        # Parentheses are weights to ComfyUI.
        if len(chunks) == 1 and "(" not in text:
            yield text, hidden, pooled


def plain(clip, text):
    with torch.inference_mode():
        return CLIPTextEncode().encode(clip, text)[0]


def encoded(clip, text):
    with torch.inference_mode():
        return encode(clip, text)


def text_of(conditioning):
    [[context, options]] = conditioning
    return pooled_of(context, options)


@MODELS
def test_dpt_text_encode_gives_the_recorded_states(model):
    clip, seen = tiny.clip(model), 0
    for text, hidden, pooled in prompts(model):
        [[context, options]] = encoded(clip, text)
        assert relative(context[0], hidden) < 1e-4, text
        assert relative(pooled_of(context, options)[0], pooled) < 1e-4, text
        seen += 1
    assert seen >= 6


@MODELS
def test_dpt_text_encode_is_clip_text_encode_with_more(model):
    clip = tiny.clip(model)
    for text in ("a red circle", "a (red:1.4) circle", "(a:0.5) " * 60):
        [[context, options]], [[ours, more]] = plain(clip, text), encoded(clip, text)
        assert torch.equal(context, ours)
        assert torch.equal(options["pooled_output"], more["pooled_output"])
        assert set(more) - set(options) == {KEY}


def test_sd1_needs_no_other_node():
    clip = tiny.clip(Tiny("sd1"))
    for text in ("a red circle", "", "a (red:1.4) circle", "a red circle, " * 40):
        assert relative(text_of(plain(clip, text)), text_of(encoded(clip, text))) < 1e-6


def test_sd2_needs_the_node():
    with pytest.raises(ValueError, match=r"not a row of its context.*DPT Text Encode"):
        text_of(plain(tiny.clip(Tiny("sd2")), "a red circle"))


@MODELS
def test_weights_and_further_chunks_do_not_change_what_is_compared_with(model):
    clip = tiny.clip(model)
    alone = text_of(encoded(clip, "a red circle"))
    assert relative(text_of(encoded(clip, "a (red:1.4) circle")), alone) < 1e-6
    [[context, options]] = encoded(clip, "a red circle, " * 40)
    assert context.shape[1] > 77
    assert options[KEY]["end_of_text"] < 77


@MODELS
def test_clip_skip(model):
    """The U-Net sees the layer that the user chose, DPT compares with the one that the adapter was trained on."""
    clip = tiny.clip(model)
    skipped = CLIPSetLastLayer().set_last_layer(clip, -3)[0]
    with pytest.raises(ValueError, match="DPT Text Encode"):
        text_of(plain(skipped, "a red circle"))
    [[context, options]] = encoded(skipped, "a red circle")
    [[unskipped, _]] = encoded(clip, "a red circle")
    assert relative(context, unskipped) > 0.01
    assert relative(pooled_of(context, options), text_of(encoded(clip, "a red circle"))) < 1e-6


@MODELS
def test_conditionings_that_other_nodes_changed(model):
    clip = tiny.clip(model)
    red, blue = encoded(clip, "a red circle"), encoded(clip, "two blue squares")
    [joined] = ConditioningConcat().concat(red, blue)
    assert relative(text_of(joined), text_of(red)) < 1e-6
    [averaged] = ConditioningAverage().addWeighted(red, blue, 0.5)
    with pytest.raises(ValueError, match="was changed after DPT Text Encode"):
        text_of(averaged)


def test_an_averaged_prompt_without_the_node_is_refused():
    clip = tiny.clip(Tiny("sd1"))
    [averaged] = ConditioningAverage().addWeighted(plain(clip, "a red circle"), plain(clip, "two blue squares in a row"), 0.5)
    with pytest.raises(ValueError, match="not a row of its context"):
        text_of(averaged)


@MODELS
def test_the_end_of_text_token_is_the_first_one(model):
    clip = tiny.clip(model)
    [chunks] = clip.tokenize("a red circle").values()
    ids = [token for token, _ in chunks[0]]
    assert end_of_text(chunks[0], 1023) == ids.index(1023) > 3
    with pytest.raises(ValueError, match="no end-of-text token 7"):
        end_of_text([(1, 1.0), (2, 1.0)], 7)
    vectors = [(1022, 1.0), (torch.ones(32), 1.0), (torch.ones(32), 1.0), (1023, 1.0)]
    assert end_of_text(vectors, 1023) == 3


def test_other_text_encoders_are_refused():
    class Sdxl:
        def tokenize(self, text):
            return {"l": [[]], "g": [[]]}

    with pytest.raises(ValueError, match="tokens are for g, l"):
        encode(Sdxl(), "a red circle")
    with pytest.raises(RuntimeError, match="no text encoder"):
        encode(None, "a red circle")
