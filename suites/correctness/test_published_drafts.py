"""Claim: a published draft resolves to the capture points that its file states, or is refused with both readings.

Born of SGLang #25454 (ids of kimi-k2.5-eagle3-mla) and of `norm_output`, which SpecForge means for the head and every
engine for the feedback: a draft of it runs with the wrong recurrence from its second step on.
"""

import pytest
import torch

from harness.checkpoints import state_of
from harness.conventions import AmbiguousLayerIds, LayerIds, resolve
from reference.config import ConfigError
from suites.catalog import PAIRS
from suites.families.eagle3 import PUBLISHED, Published

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

DRAFTS = pytest.mark.parametrize("draft", PUBLISHED.values(), ids=list(PUBLISHED))


def read(draft: Published, layer_ids: str | None = None) -> LayerIds:
    return resolve(draft.keys, draft.layers, layer_ids=layer_ids)


@DRAFTS
def test_its_ids_mean_what_the_file_says_or_nothing(draft: Published) -> None:
    both = draft.after is not None and draft.before is not None and not draft.stated
    if not both:
        assert read(draft).points == (draft.after or draft.before)
        return
    with pytest.raises(AmbiguousLayerIds) as caught:
        read(draft)
    for points in (draft.after, draft.before):
        assert str(points) in str(caught.value)
    assert read(draft, "after_layer").points == draft.after
    assert read(draft, "before_layer").points == draft.before


@DRAFTS
def test_its_body_is_built_as_it_says(draft: Published) -> None:
    pair, keys = PAIRS["eagle3"], dict(draft.keys)
    if draft.norm_output:
        with pytest.raises(ConfigError, match=r"norm_output.*head.*feedback"):
            pair.read_config(keys)
        assert not pair.read_config(keys, norm_output="head").feedback_normed
        assert pair.read_config(keys, norm_output="feedback").feedback_normed
    config = pair.read_config(keys, **({"norm_output": "feedback"} if draft.norm_output else {}))

    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in state_of(pair.reference(config)).items()}

    body = draft.keys.get("transformer_layer_config", draft.keys)
    hidden, heads = body["hidden_size"], body["num_attention_heads"]
    width = body.get("head_dim", hidden // heads)
    assert shapes["fc.weight"] == (hidden, 3 * hidden)
    assert shapes["layers.0.self_attn.q_proj.weight"] == (heads * width, 2 * hidden)
    assert shapes["layers.0.self_attn.k_proj.weight"] == (body["num_key_value_heads"] * width, 2 * hidden)
    assert shapes["lm_head.weight"] == (draft.keys["draft_vocab_size"], hidden)
    assert ("fc_norm.0.weight" in shapes) == bool(draft.keys.get("fc_norm"))
    assert ("input_norm.weight" in shapes) == bool(draft.keys.get("norm_before_fc"))
    assert config.norm_before_residual == bool(draft.keys.get("norm_before_residual"))
