import pytest
import torch

from dpt.text import KEY, encode, pooled_of


def context(batch=1, tokens=77, width=8):
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(0))


def test_sd1s_pooled_output_is_a_row_of_the_context():
    states = context(batch=2)
    pooled = torch.stack([states[0, 5], states[1, 9]])
    assert torch.equal(pooled_of(states, {"pooled_output": pooled}), pooled)


def test_what_is_not_a_row_is_refused():
    states = context()
    for wrong in (states[:, 5] * 1.01, states[:, 5:7].mean(dim=1), torch.zeros(1, 8)):
        with pytest.raises(ValueError, match=r"not a row of its context.*DPT Text Encode"):
            pooled_of(states, {"pooled_output": wrong})
    with pytest.raises(ValueError, match="not a row of its context"):
        pooled_of(torch.zeros(1, 77, 8), {"pooled_output": torch.zeros(1, 8)})


def test_every_item_must_have_its_row():
    states = context(batch=2)
    with pytest.raises(ValueError, match="not a row"):
        pooled_of(states, {"pooled_output": torch.stack([states[0, 5], states[0, 5]])})


def test_a_pooled_output_of_another_width_or_none():
    with pytest.raises(ValueError, match="no pooled output beside a context of width 8"):
        pooled_of(context(), {})
    with pytest.raises(ValueError, match="a pooled output of width 4 beside a context of width 8"):
        pooled_of(context(), {"pooled_output": torch.ones(1, 4)})


def test_a_kept_row_counts_while_the_context_has_it():
    states = context()
    kept = {"end_of_text": 5, "row": states[:, 5].clone(), "pooled": torch.ones(1, 8)}
    assert torch.equal(pooled_of(states, {KEY: kept, "pooled_output": None}), torch.ones(1, 8))
    for changed in (states * 0.5, states[:, :5]):
        with pytest.raises(ValueError, match="was changed after DPT Text Encode"):
            pooled_of(changed, {KEY: kept})


class Clip:
    """The documented parts of comfy.sd.CLIP: tokens in, conditioning out, layers skipped by clip_layer."""

    def __init__(self):
        self.layer_idx = None
        self.cond_stage_model = type("Model", (), {"clip_l": type("L", (), {"special_tokens": {"end": 9}})()})()

    def clone(self):
        return Clip()

    def clip_layer(self, layer):
        self.layer_idx = layer

    def tokenize(self, text):
        return {"l": [[(1, 1.0), *((int(word), 1.0) for word in text.split()), (9, 1.0), (9, 1.0)]]}

    def encode_from_tokens(self, tokens):
        ids = torch.tensor([[float(token) for token, _ in chunk] for chunk in tokens["l"]]).unsqueeze(-1)
        positions = torch.arange(ids.shape[1]).view(1, -1, 1)
        return torch.cat([ids, positions, torch.full_like(ids, self.layer_idx or 0)], dim=-1)

    def encode_from_tokens_scheduled(self, tokens):
        return [[self.encode_from_tokens(tokens), {"pooled_output": torch.zeros(1, 3)}]]


def test_encode_keeps_the_row_of_the_first_end_of_text_token():
    [[states, options]] = encode(Clip(), "4 5")
    assert options[KEY]["end_of_text"] == 3
    assert pooled_of(states, options).tolist() == [[9, 3, 0]]


def test_encode_keeps_the_unskipped_layers_row():
    clip = Clip()
    clip.clip_layer(-2)
    [[states, options]] = encode(clip, "4 5 6")
    assert states[0, 0].tolist() == [1, 0, -2]
    assert pooled_of(states, options).tolist() == [[9, 4, 0]]
