"""Claim: a checkpoint with any byte or any value in it opens and runs, or is refused by its own error.

Born of SGLang's reader of layer ids, where any exception means the default layers, and of SGLang #36528, where a wrong
path ends in a missing attribute. A table of known faults has only the faults that somebody thought of.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import SINGLE, CheckpointError
from suites.catalog import OpenTarget, open_draft, open_target
from suites.damage import damaged, write, write_key
from suites.draws import EAGLE3, LLAMA

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]


@given(share=st.floats(0, 1, exclude_max=True))
@example(share=0.0)
@example(share=0.00001)
@example(share=0.005)
@example(share=0.999999)
def test_weights_cut_at_any_byte_are_refused(
    share: float, target: OpenTarget, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = (draft_folder / SINGLE).read_bytes()
    folder = damaged(draft_folder, tmp_path_factory.mktemp("cut"), write(SINGLE, raw[: int(share * len(raw))]))

    with pytest.raises(CheckpointError, match=SINGLE):
        open_draft(folder, target)


@given(at=st.integers(0, 1500), byte=st.integers(0, 255))
@example(at=3, byte=255)
@example(at=8, byte=ord("["))
@example(at=60, byte=0)
@example(at=90, byte=ord("-"))
def test_a_header_with_any_wrong_byte_is_read_or_refused(
    at: int, byte: int, target: OpenTarget, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    raw = bytearray((draft_folder / SINGLE).read_bytes())
    raw[at] = byte
    folder = damaged(draft_folder, tmp_path_factory.mktemp("byte"), write(SINGLE, bytes(raw)))

    read_or_refused(lambda: open_draft(folder, target))


ANYTHING = (None, True, False, 0, 1, -1, 3, 0.0, 1.5, 1e300, "", "3", [], [1], [None], ["x"], {}, {"x": 1}, [[1]])
NESTED = sorted({"norm_before_head", "feedback_normed", "later_norm", "use_aux_hidden_state", *EAGLE3["eagle_config"]})
ROPE = ("rope_type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings", "truncate")
OTHERS = (
    "norm_output",
    "fc_norm",
    "layer_types",
    "sliding_window",
    "logit_scale",
    "target_hidden_size",
    "num_aux_layers",
)


@given(key=st.sampled_from(sorted({*LLAMA, *EAGLE3, *OTHERS})), value=st.sampled_from(ANYTHING))
@example(key="head_dim", value=0)
@example(key="num_attention_heads", value=0)
@example(key="architectures", value=3)
@example(key="layer_types", value=1)
@example(key="logit_scale", value=[])
@example(key="rope_parameters", value=["x"])
def test_any_value_under_any_key_is_read_or_refused(
    key: str,
    value: Any,
    target_folder: Path,
    target: OpenTarget,
    draft_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    change = write_key(key, value)
    root = tmp_path_factory.mktemp("key")

    read_or_refused(lambda: open_draft(damaged(draft_folder, root / "draft", change), target))
    read_or_refused(lambda: open_target(damaged(target_folder, root / "target", change)))


@given(key=st.sampled_from(NESTED), rope=st.sampled_from(ROPE), value=st.sampled_from(ANYTHING))
@example(key="later_norm", rope="rope_theta", value=[])
@example(key="layer_ids", rope="rope_type", value=[])
@example(key="norm_before_head", rope="partial_rotary_factor", value=1.5)
def test_any_value_under_any_nested_key_is_read_or_refused(
    key: str, rope: str, value: Any, target: OpenTarget, draft_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    eagle, turn = {**EAGLE3["eagle_config"], key: value}, {**EAGLE3["rope_parameters"], rope: value}
    root = tmp_path_factory.mktemp("nested")

    read_or_refused(lambda: open_draft(damaged(draft_folder, root / "eagle", write_key("eagle_config", eagle)), target))
    read_or_refused(
        lambda: open_draft(damaged(draft_folder, root / "rope", write_key("rope_parameters", turn)), target)
    )


def read_or_refused(opening: Callable[[], Any]) -> None:
    """Either the checkpoint opens and runs, or its owner is told; no other error comes out."""
    try:
        opened = opening()
    except CheckpointError:
        return
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    run = getattr(opened, "fuse", None)
    hidden = run(torch.zeros(1, 3, len(opened.capture_points), 96)) if run else None
    assert (opened(tokens) if hidden is None else opened(tokens, hidden)).logits.shape[:2] == (1, 3)
