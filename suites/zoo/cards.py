"""The model cards of the zoo, written from what training recorded."""

from typing import Any

FRONT_MATTER = """---
license: apache-2.0
language: en
library_name: draftproof
tags: [{tags}, speculative-decoding, tiny]
---
"""

TARGET = """
# llama: the zoo's target

A Llama of {millions:.2f} M parameters that writes text which looks like Python: {recipe[layers]} layers, hidden size
{recipe[hidden]}, {recipe[heads]} query heads over {recipe[kv_heads]} key/value heads, byte-level BPE of
{recipe[vocab]} tokens, {recipe[positions]} positions, bfloat16. It is trained, not useful: it exists so that claims and
benchmarks of speculative decoding run on a real distribution without a download.

Held-out cross entropy: {held_out_loss:.3f} nats a token.
"""

DRAFT = """
# llama-eagle3: the zoo's draft

An EAGLE-3 draft of {millions:.2f} M parameters of its own for `../llama`: one layer, a head over
{recipe[draft_vocab]} of the target's tokens, the embedding shared with the target. It was trained by training-time
test over {recipe[draft_steps]} draft steps against the target's distribution, half on the corpus and half on
{recipe[samples]} continuations that the target wrote itself. `eagle_config.layer_ids` states the convention of its
layer ids: `after_layer`.

Held-out soft cross entropy of the draft steps in order: {losses} nats a token.
"""

MEASURED = """
## Measured

{prompts} held-out prompts (`../prompts.jsonl`), K = {num_draft_tokens}, seed {seed}, float32, reference side. The
acceptance length counts the target's own token; rates are unconditional, one a draft position; a 4-gram is repeated if
it stood earlier in the same text. The target loops when it decodes greedily, more the longer the text, and loops are
easy to draft: compare greedy acceptance lengths at the same number of tokens, and read the last column beside them.

| temperature | tokens | acceptance length | standard error | rates | repeated 4-grams |
|---|---|---|---|---|---|
{rows}

Teacher-forced loss on {sequences} held-out sequences when the capture points are moved by one layer, against the right
ones: {shifts}.
"""

ROW = (
    "| {temperature:g} | {num_tokens} | {acceptance_length:.3f} | {standard_error:.3f} "
    "| {rates} | {repeated_share:.3f} |"
)
SHIFT = "{shift:+d} layer {loss:+.3f} nats ({errors:.1f} standard errors)"

ORIGIN = """
## Text

The {corpus[text]}: {corpus[files]} files, {corpus[characters]} characters after cleaning; third-party packages, tests
and tables of characters are left out. License PSF-2.0. {held_out} whole files were held out from everything, the
tokenizer included; their names and the sha256 of the corpus are in `training.json`. The weights are under Apache-2.0.

## Made by

`draftproof zoo train` with Python {versions[python]}, torch {versions[torch]}, transformers {versions[transformers]},
{versions[threads]} threads, in {seconds:.0f} s on a shared machine. Every number of the recipe and the
loss curve are in `training.json`. Another Python version has another library and gives other weights.
"""


def target_card(record: dict[str, Any]) -> str:
    """The README.md beside the target's weights."""
    return (
        FRONT_MATTER.format(tags="llama")
        + TARGET.format(millions=record["parameters"] / 1e6, **record)
        + origin(record)
    )


def draft_card(record: dict[str, Any]) -> str:
    """The README.md beside the draft's weights."""
    losses = ", ".join(f"{loss:.3f}" for loss in record["held_out_losses"])
    body = DRAFT.format(millions=record["parameters"] / 1e6, losses=losses, **record)
    return FRONT_MATTER.format(tags="eagle3") + body + measured(record["measured"]) + origin(record)


def measured(found: dict[str, Any]) -> str:
    """Acceptance on held-out prompts and the cost of wrong capture points."""
    rows = [ROW.format(**{**case, "rates": ", ".join(f"{r:.3f}" for r in case["rates"])}) for case in found["cases"]]
    shifts = ", ".join(SHIFT.format(**shift) for shift in found["shifts"])
    return MEASURED.format(**{**found, "rows": "\n".join(rows), "shifts": shifts})


def origin(record: dict[str, Any]) -> str:
    """Where the text came from and what made the weights."""
    return ORIGIN.format(held_out=len(record["corpus"]["held_out"]), **record)
