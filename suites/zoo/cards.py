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
# {name}: a target of the zoo

{what}
of {millions:.2f} M parameters that writes text which looks like Python, over the zoo's byte-level BPE of
{recipe[vocab]} tokens, {recipe[positions]} positions, bfloat16. It is trained, not useful: it exists so that claims and
benchmarks of speculative decoding run on a real distribution without a download.

{architecture}

Held-out cross entropy: {held_out_loss:.3f} nats a token.
"""

UNLEARNED = """
A target this small loops when it decodes greedily, and loops are easy to draft. After its steps on the corpus it was
trained for {rounds} rounds to make tokens unlikely that close a repeated 4-gram of its own greedy text
(arXiv 1908.04319): of these texts {first:.2f} of the 4-grams were repeated before, {last:.2f} in the last round. That
costs some cross entropy and is why greedy text of this target is more varied than its size would have it.
"""

TARGETS = {
    "llama": "A Llama",
    "gemma3_text": "A Gemma 3 (sliding and full layers)",
    "gemma4_text": "A Gemma 4 (full layers with heads of their own whose values are their keys, a softcap)",
    "deepseek_v3": "A DeepSeek V3 (latent attention, sigmoid routing by group, shared experts)",
    "qwen3_moe": "A Qwen3-MoE (normed heads, experts by softmax)",
}

DRAFT = """
# {name}: a draft of the zoo

{what}

{millions:.2f} M parameters of its own, for `../{target}`. It was trained against the target's distribution over
{recipe[draft_steps]} draft step{plural}, half on the corpus and half on {recipe[samples]} continuations that the target
wrote itself.

{architecture}

Held-out soft cross entropy of the draft steps in order: {losses} nats a token.
"""

EAGLE = "one layer, a head over {draft_vocab} of the target's tokens, the embedding shared with the target"
DRAFTS = {
    "eagle3": f"EAGLE-3 by training-time test: {EAGLE}.",
    "eagle3-postnorm": (
        f"EAGLE-3 whose aux states are normed one by one (`fc_norm`) and whose feedback is normed: {EAGLE}. "
        "`norm_output` has two readings among engines and trainers; `eagle_config` states the one that is meant."
    ),
    "eagle3-mla": f"EAGLE-3 with latent attention: {EAGLE}.",
    "peagle": (
        "P-EAGLE: a head over {draft_vocab} of the target's tokens, the embedding shared with the target. Later draft "
        "steps read `mask_hidden` and the token `ptd_token_id`, which no text has."
    ),
    "dflash": (
        "D-Flash: all tokens of a block in one pass over keys made of the target's aux states; embedding and head are "
        "the target's. The mask is a token that no text has."
    ),
    "mtp": "A next-token module: one layer of the target's kind, with experts; embedding and head are the target's.",
    "assistant": (
        "A Gemma 4 assistant: layers of queries alone, which read the target's keys. In training these keys came from "
        "the project's reference page of the target."
    ),
    "standalone": "A Llama of another width and depth that shares nothing with its target but the vocabulary.",
}
IDS = " `eagle_config.layer_ids` states the convention of its layer ids: `after_layer`."

MEASURED = """
## Measured

{prompts} held-out prompts (`../prompts.jsonl`), K = {num_draft_tokens}, seed {seed}, float32, reference side. The
acceptance length counts the target's own token; rates are unconditional, one a draft position; a 4-gram is repeated if
it stood earlier in the same text. The target loops when it decodes greedily, more the longer the text, and loops are
easy to draft: compare greedy acceptance lengths at the same number of tokens, and read the last column beside them.

| temperature | tokens | acceptance length | standard error | rates | repeated 4-grams |
|---|---|---|---|---|---|
{rows}
"""
SHIFTED = """
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
threads: {versions[threads]}, in {seconds:.0f} s on a shared machine. Every number of the recipe and the
loss curve are in `training.json`. Another Python version has another library and gives other weights.
"""


def target_card(name: str, record: dict[str, Any]) -> str:
    """The README.md beside the target's weights."""
    recipe = record["recipe"]
    body = TARGET.format(
        name=name,
        what=TARGETS[recipe["model_type"]],
        millions=record["parameters"] / 1e6,
        architecture=listed(recipe["architecture"]),
        **record,
    )
    shares = record["loop_shares"]
    body += UNLEARNED.format(rounds=len(shares), first=shares[0], last=shares[-1]) if shares else ""
    return FRONT_MATTER.format(tags=recipe["model_type"]) + body + origin(record)


def draft_card(name: str, record: dict[str, Any]) -> str:
    """The README.md beside the draft's weights."""
    recipe = record["recipe"]
    what = DRAFTS[recipe["way"]].format(**recipe) + (IDS if "eagle" in recipe["way"] else "")
    body = DRAFT.format(
        name=name,
        target=name.partition("-")[0],
        what=what,
        millions=record["parameters"] / 1e6,
        plural="s" * (recipe["draft_steps"] > 1),
        losses=", ".join(f"{loss:.3f}" for loss in record["held_out_losses"]),
        architecture=listed(recipe["architecture"]),
        **record,
    )
    return FRONT_MATTER.format(tags=recipe["way"]) + body + measured(record["measured"]) + origin(record)


def listed(architecture: dict[str, Any]) -> str:
    """What a recipe says of the config, one key a line, as the config has it."""
    flat = {**architecture, **architecture.get("text_config", {})}
    return "\n".join(f"- `{key}`: {value}" for key, value in flat.items() if key != "text_config") or (
        "- all as the target's config has it"
    )


def measured(found: dict[str, Any]) -> str:
    """Acceptance on held-out prompts and, where a draft reads aux states, the cost of wrong capture points."""
    rows = [ROW.format(**{**case, "rates": ", ".join(f"{r:.3f}" for r in case["rates"])}) for case in found["cases"]]
    text = MEASURED.format(**{**found, "rows": "\n".join(rows)})
    shifts = ", ".join(SHIFT.format(**shift) for shift in found["shifts"])
    return text + (SHIFTED.format(**{**found, "shifts": shifts}) if shifts else "")


def origin(record: dict[str, Any]) -> str:
    """Where the text came from and what made the weights."""
    return ORIGIN.format(held_out=len(record["corpus"]["held_out"]), **record)
