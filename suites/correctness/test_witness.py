"""Claim: the reference computes what transformers computes, layer by layer.

Born of vLLM #43671 and SGLang #39286: a target whose text is right and whose captured states are not.
Every capture point is held to a forward hook on the outside implementation, the ends 0 and L included:
its own list of hidden states gives the last one after the final norm.
"""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness import witness
from harness.compare import hold
from suites.catalog import open_target
from suites.draws import PINNED_TARGET, Drawn, folders, llama_targets, random_tokens

pytestmark = [pytest.mark.correctness, pytest.mark.pair("llama")]


@given(drawn=llama_targets(), batch=st.integers(1, 3), width=st.integers(1, 48))
@example(drawn=PINNED_TARGET, batch=2, width=70)
def test_the_reference_equals_transformers_at_every_capture_point(drawn: Drawn, batch: int, width: int) -> None:
    config = drawn.keys
    layers, tokens = config["num_hidden_layers"], random_tokens(config["vocab_size"], batch, width, drawn.seed)
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens)

    out = target(tokens, capture=range(layers + 1))

    size = {"depth": layers, "width": config["hidden_size"]}
    for c in range(layers + 1):
        hold(f"capture point {c}", out.aux[:, :, c], outside.aux[:, :, c], **size)
    hold("hidden", out.hidden, outside.hidden, **size)
    hold("logits", out.logits, outside.logits, **size)


@given(drawn=llama_targets(kinds=("default", "llama3")), batch=st.integers(1, 3), width=st.integers(1, 12))
@example(drawn=PINNED_TARGET, batch=2, width=9)
def test_positions_need_not_start_at_zero(drawn: Drawn, batch: int, width: int) -> None:
    tokens = random_tokens(drawn.keys["vocab_size"], batch, width, drawn.seed)
    # angles are float32: a position that was ignored shows at 1e-7, far beyond a float64 budget
    positions = torch.arange(width).expand(batch, width) + 5
    with folders(drawn) as (path, _):
        target = open_target(path, dtype=torch.float64)
        outside = witness.load(path, dtype=torch.float64).run(tokens, positions)

    out = target(tokens, positions)

    hold("logits", out.logits, outside.logits, depth=target.num_layers, width=target.config.hidden)
