"""Claim: a converted draft is the same draft: nothing is lost on the way there and back, or it is refused in words.

Born of TorchSpec's export for vLLM, which rewrites layer ids by hand for one family of targets, and of converters that
load with `strict=False`: a fact that the other format has no word for disappears, and acceptance with it.
"""

import contextlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harness.checkpoints import SINGLE, Checkpoint, CheckpointError, open_checkpoint
from harness.compare import bit_equal
from suites.catalog import OpenTarget, open_draft
from suites.dialects import DIALECTS, DRAFTPROOF
from suites.draws import EVERY_FLAG, PINNED_DRAFT, PINNED_TARGET, SEEDS, Drawn, eagle3_drafts, variant, write_draft
from suites.formats.effect import differences
from suites.formats.reading import Reading, read_as
from suites.formats.writing import DialectError, convert

pytestmark = [pytest.mark.correctness, pytest.mark.pair("eagle3")]

LAYERS = 8
ALL = st.sampled_from(sorted(DIALECTS))
NORMS_KNOWN = ("torchspec", "torchspec-vllm", "speculators", "sglang", "vllm-v1", "vllm-v2", DRAFTPROOF)
"""dialects with words for a norm before `fc` and for a normed feedback"""
PLAIN = variant(
    num_attention_heads=6, eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 3, 4], "layer_ids": "after_layer"}
)
NORMED = variant(fc_norm=True, eagle_config={"feedback_normed": True, "norm_before_head": True})


def spoken(folder: Path, dialect: str, target: str = "llama") -> tuple[Checkpoint, Reading]:
    """A folder and what it means to who speaks this dialect."""
    checkpoint = open_checkpoint(folder)
    reading = read_as(checkpoint, dialect, LAYERS, target)
    assert isinstance(reading, Reading), reading
    return checkpoint, reading


def files(folder: Path) -> Mapping[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@st.composite
def sayable(draw: st.DrawFn) -> tuple[Drawn, str, str]:
    """A draft and two dialects that have words for all of it."""
    normed = draw(st.booleans())
    known = NORMS_KNOWN if normed else (*NORMS_KNOWN, "specforge", "modelopt")
    ids = sorted(draw(st.sets(st.integers(1, LAYERS - 2), min_size=3, max_size=3)))
    flags = {"fc_norm": normed, "draft_vocab_size": draw(st.sampled_from([64, 97, 331]))}
    eagle = {"eagle_aux_hidden_state_layer_ids": ids, "feedback_normed": normed, "norm_before_head": True}
    pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
    return variant(seed=draw(SEEDS), **flags, eagle_config=eagle), *pair


@given(case=sayable(), target=st.sampled_from(["llama", "deepseek"]))
@example(case=(PLAIN, "specforge", "vllm-v1"), target="llama")
@example(case=(PLAIN, "safeailab", "speculators"), target="llama")
@example(case=(PLAIN, "tensorrt-llm", "modelopt"), target="llama")
@example(case=(PLAIN, "speculators", "vllm-v1"), target="llama")
@example(case=(PINNED_DRAFT, "sglang", "vllm-v2"), target="deepseek")
@example(case=(NORMED, "torchspec", "speculators"), target="llama")
@example(case=(EVERY_FLAG, DRAFTPROOF, DRAFTPROOF), target="llama")
def test_there_and_back_is_bit_equal(case: tuple[Drawn, str, str], target: str) -> None:
    drawn, one, other = case
    with tempfile.TemporaryDirectory() as root:
        first, second, third = (Path(root, name) for name in ("first", "second", "third"))
        checkpoint, meant = spoken(write_draft(drawn, Path(root, "source")), DRAFTPROOF, target)

        convert(checkpoint, first, one, meant, LAYERS, target)
        convert(*out_of(first, second, one, other, target))
        convert(*out_of(second, third, other, one, target))
        there, back = files(first), files(third)
        said = spoken(third, one, target)[1]

    assert there == back
    # engines that replace the embedding do so beside the file, which keeps its own
    assert [d.fact for d in differences(meant, said) if d.fact != "embedding"] == []


def out_of(source: Path, out: Path, spoken_in: str, to: str, target: str) -> tuple[Any, ...]:
    """The arguments of `convert` for a folder in a dialect."""
    checkpoint, reading = spoken(source, spoken_in, target)
    return checkpoint, out, to, reading, LAYERS, target


@given(drawn=eagle3_drafts(PINNED_TARGET), dialect=ALL)
@example(drawn=EVERY_FLAG, dialect="vllm-v1")
@example(drawn=NORMED, dialect="modelopt")
@example(drawn=PLAIN, dialect="vllm-v1")
def test_what_is_written_is_read_as_meant_or_nothing_is_written(drawn: Drawn, dialect: str) -> None:
    with tempfile.TemporaryDirectory() as root:
        checkpoint, meant = spoken(write_draft(drawn, Path(root, "source")), DRAFTPROOF)
        out = Path(root, "out")
        with contextlib.suppress(DialectError):
            convert(checkpoint, out, dialect, meant, LAYERS)
        wrong = differences(meant, spoken(out, dialect)[1]) if out.exists() else []

    assert [d.fact for d in wrong if d.fact != "embedding"] == []


@pytest.mark.parametrize("dialect", ["specforge", "speculators", "torchspec", "sglang", "vllm-v1", "vllm-v2"])
def test_a_plain_draft_can_be_said_in_every_dialect(dialect: str, target: OpenTarget, tmp_path: Path) -> None:
    source, there, back = (tmp_path / name for name in ("source", "there", "back"))
    write_draft(PLAIN, source)

    convert(*out_of(source, there, DRAFTPROOF, dialect, "llama"))
    convert(*out_of(there, back, dialect, DRAFTPROOF, "llama"))

    draft, again = (open_draft(tmp_path / name, target) for name in ("source", "back"))
    assert draft.capture_points == again.capture_points
    for (name, mine), theirs in zip(draft.module.named_parameters(), again.module.parameters(), strict=True):
        bit_equal(name, theirs, mine)


def test_marks_are_derived_where_they_are_stored(tmp_path: Path) -> None:
    source, there, back = (tmp_path / name for name in ("source", "there", "back"))
    write_draft(PLAIN, source)

    convert(*out_of(source, there, DRAFTPROOF, "modelopt", "llama"))
    convert(*out_of(there, back, "modelopt", "specforge", "llama"))

    assert "t2d" not in open_checkpoint(there).headers
    bit_equal("t2d", open_checkpoint(back).read("t2d"), open_checkpoint(source).read("t2d"))


UNSAYABLE = (
    ("sglang", {"norm_before_residual": True}, "norm_before_residual"),
    ("specforge", {"eagle_config": {"feedback_normed": True}}, "feedback_normed"),
    ("vllm-v1", {"eagle_config": {"norm_before_head": False}}, "norm_before_head"),
    ("tensorrt-llm", {}, "points"),
    ("modelopt", {"fc_norm": True}, "fc_norm"),
    ("vllm-v2", {"bias": True}, "fc_bias"),
    ("sglang", {"num_hidden_layers": 2}, "later_norm"),
    ("sglang", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 7]}}, "capture point"),
    ("vllm-v1", {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [5, 1, 3]}}, "points"),
)


@pytest.mark.parametrize(("dialect", "flags", "word"), UNSAYABLE, ids=[f"{d}: {w}" for d, _, w in UNSAYABLE])
def test_what_a_dialect_cannot_say_is_refused(dialect: str, flags: dict[str, Any], word: str, tmp_path: Path) -> None:
    checkpoint, meant = spoken(write_draft(variant(**flags), tmp_path / "source"), DRAFTPROOF)

    with pytest.raises(DialectError, match=word):
        convert(checkpoint, tmp_path / "out", dialect, meant, LAYERS)

    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    checkpoint, meant = spoken(write_draft(PLAIN, tmp_path / "source"), DRAFTPROOF)
    before = files(tmp_path / "source")

    with pytest.raises(CheckpointError, match="not an empty folder"):
        convert(checkpoint, tmp_path / "source", "vllm-v1", meant, LAYERS)

    assert files(tmp_path / "source") == before


def test_a_missing_matrix_is_not_invented(tmp_path: Path) -> None:
    folder = write_draft(PLAIN, tmp_path / "source")
    checkpoint = open_checkpoint(folder)
    headers = {name: header for name, header in checkpoint.headers.items() if name != "fc.weight"}
    lame = Checkpoint(checkpoint.path, checkpoint.config, headers)
    meant = read_as(lame, "sglang", LAYERS)
    assert isinstance(meant, Reading)

    with pytest.raises(DialectError, match=r"'fc\.weight' is missing"):
        convert(lame, tmp_path / "out", "vllm-v1", meant, LAYERS)

    assert (folder / SINGLE).exists()
    assert json.loads((folder / "config.json").read_text()) == checkpoint.config
