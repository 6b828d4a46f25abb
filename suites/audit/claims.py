"""What a draft's config says, apart from what its weights say; and the draft as it stands without what it says.

`neutral` keeps what cannot be had elsewhere (sizes, heads, the mask token) and drops every hint: layer ids and their
convention, norm flags, feedback, rope, experts a token, softcap. What the tensors themselves show is taken from them:
which norms have weights, how many layers there are. `read_claims` reads the hints, as one value or as several where the
file can be read in more than one way; nothing of it enters the search but as one more reading to try.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from harness.checkpoints import CONFIG, Checkpoint, CheckpointError, rename
from harness.conventions import (
    AFTER,
    BEFORE,
    DFLASH_KEYS,
    ID_KEYS,
    AmbiguousLayerIds,
    default_points,
    is_legal,
    resolve,
    spell,
    to_points,
)
from harness.pairs import Pair
from reference.config import ConfigError
from reference.drafts.eagle3_keys import check_vocab_map
from reference.drafts.peagle import MASK_KEYS
from suites.algorithms import ALGORITHMS, find_pair
from suites.audit.candidates import FACTS, Edit, Value, candidates, edit_of, shown, standing
from suites.audit.contrasts import SAME, UNSURE, WORSE, Contrast
from suites.audit.identify import MOVES, POINTS, Answer, Identified
from suites.audit.variants import Restated
from suites.catalog import PAIRS, open_draft
from suites.formats.places import BODY, find, flat
from suites.formats.reading import DRAFTS, Refusal, read_as
from suites.opened import OpenDraft, OpenTarget

AGREES, CONTRADICTED, UNMEASURED = "agrees", "contradicted", "not measured"
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")
ARCHITECTURES = {
    "eagle3": "LlamaForCausalLMEagle3",
    "eagle3_mla": "Eagle3DeepseekV2ForCausalLM",
    "peagle": "PeagleLlamaForCausalLM",
}
LAYER = re.compile(r"layers\.(\d+)\.")
MEASURABLE = (
    "experts a token",
    "rope theta",
    "rope scaling",
    "rope of sliding layers",
    "rope of full layers",
    "softcap",
)
"""facts whose claimed value is measured although the table would not try it"""


@dataclass(frozen=True)
class Claims:
    """What a config says, by fact of the table."""

    values: Mapping[str, tuple[Value, ...]]
    """several where the file has several readings"""
    points: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()
    """what could not be read"""


@dataclass(frozen=True)
class Claim:
    """One claim and what was measured of it."""

    fact: str
    claimed: tuple[Value, ...]
    found: Value
    verdict: str
    contrast: Contrast | None = None
    """of the claimed reading against what was found"""

    def __str__(self) -> str:
        said, found = " or ".join(map(shown, self.claimed)), shown(self.found)
        if self.verdict == AGREES:
            return f"{self.fact}: {found}, as config.json says" + (f" ({said})" if len(self.claimed) > 1 else "")
        cost = self.contrast
        apart = f", {cost.nats:+.4f} nats a token [{cost.low:+.4f}, {cost.high:+.4f}]" if cost else ""
        return f"{self.fact}: config.json says {said}, the weights say {found}: {self.verdict}{apart}"

    def summary(self) -> dict[str, Any]:
        """Plain values, as `--json` prints them."""
        cost = self.contrast._asdict() if self.contrast else {}
        numbers = {name: cost.get(name) for name in ("nats", "low", "high", "p", "sequences")}
        words = {"claimed": [shown(value) for value in self.claimed], "found": shown(self.found)}
        return {"fact": self.fact, **words, "verdict": self.verdict, **numbers, "text": str(self)}


def neutral(checkpoint: Checkpoint, pair: Pair, num_layers: int) -> Checkpoint:
    """The checkpoint under a config without hints; num_layers: of the target."""
    names = [rename(name, _body(checkpoint, pair).page.CHECKPOINT_NAMES) for name in checkpoint.headers]
    config = flat(checkpoint.config)
    if pair.name in ARCHITECTURES:
        config = _bare_eagle3(config, pair, names, checkpoint, num_layers)
    elif pair.name == "dflash":
        config = _bare_dflash(config, names, num_layers)
    elif pair.name == "gemma4_assistant":
        hints = ("rope_parameters", "final_logit_softcapping")
        config["text_config"] = {k: v for k, v in config.get("text_config", {}).items() if k not in hints}
    elif pair.name == "qwen3_moe_mtp":
        config = {k: v for k, v in config.items() if k not in (*ROPE, "norm_topk_prob", "num_experts_per_tok")}
        config["num_experts_per_tok"] = 1
    elif pair.name == "standalone" and not {"layer_types", "sliding_window"} & config.keys():
        config = {k: v for k, v in config.items() if k not in ROPE} | _depth(names)
    return replace(checkpoint, config=config)


def open_neutral(checkpoint: Checkpoint, target: OpenTarget, token_map: Tensor | None = None) -> OpenDraft:
    """The draft as it stands without hints, reference side; errors: those of `open_draft`."""
    pair = PAIRS[find_pair(checkpoint, "draft", "STANDALONE" if token_map is not None else None)]
    try:
        bare = neutral(checkpoint, pair, target.num_layers)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        # sizes of another kind than numbers, sections that are none
        said = f"{checkpoint.path / CONFIG}: cannot be read without its hints: {error}"
        raise CheckpointError(said) from error
    return open_draft(_with_offsets(bare), target, token_map=token_map, algorithm=ALGORITHMS[pair.name])


def _with_offsets(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint, with offsets in the place of a map that is none as offsets and sound as target ids."""
    name = next((name for name in checkpoint.headers if name.endswith("d2t")), None)
    if name is None or checkpoint.headers[name].dtype != torch.int64:
        return checkpoint
    stored, vocab = checkpoint.read(name), int(checkpoint.config["vocab_size"])
    offsets = stored - torch.arange(len(stored))
    if not check_vocab_map(stored, None, vocab) or check_vocab_map(offsets, None, vocab):
        return checkpoint
    facts = (checkpoint.path, checkpoint.config, checkpoint.headers, checkpoint.blocks, checkpoint.scales)
    return Restated(*facts, values={name: offsets})


def _body(checkpoint: Checkpoint, pair: Pair) -> Pair:
    """The pair whose page reads the draft: of a model that drafts alone, that of the model."""
    return PAIRS[find_pair(checkpoint, "target")] if pair.name == "standalone" else pair


def _depth(names: Sequence[str]) -> dict[str, int]:
    """How many layers have tensors."""
    found = [int(match[1]) for match in map(LAYER.match, names) if match]
    return {"num_hidden_layers": max(found) + 1} if found else {}


def _bare_eagle3(
    config: dict[str, Any], pair: Pair, names: Sequence[str], checkpoint: Checkpoint, num_layers: int
) -> dict[str, Any]:
    kept = {k: v for k, v in config.items() if k in (*BODY, *MASK_KEYS) and k not in ROPE}
    ours = dict(zip(names, checkpoint.headers, strict=True))
    width = int(config.get("target_hidden_size") or config.get("hidden_size", 1))
    states = checkpoint.headers[ours["fc.weight"]].shape[1] // width if "fc.weight" in ours else 0
    eagle: dict[str, Any] = {"use_aux_hidden_state": bool(states)}
    if states:
        points = _spread(num_layers, states)
        word = BEFORE if 0 in points else AFTER
        ids = list(spell(points, word, num_layers))
        eagle |= {"layer_ids": word, "eagle_aux_hidden_state_layer_ids": ids}
    return {
        **kept,
        **_depth(names),
        "architectures": [ARCHITECTURES[pair.name]],
        "model_type": "qwen3" if any(".q_norm." in name for name in names) else "llama",
        "eagle_config": eagle,
        "fc_norm": any(name.startswith("fc_norm.") for name in names),
        "norm_before_fc": "input_norm.weight" in ours,
        "bias": "fc.bias" in ours,
        "attention_bias": any(".self_attn." in name and name.endswith("_proj.bias") for name in names),
        "mlp_bias": any(".mlp." in name and name.endswith(".bias") for name in names),
    }


def _bare_dflash(config: dict[str, Any], names: Sequence[str], num_layers: int) -> dict[str, Any]:
    block = {k: v for k, v in (config.get("dflash_config") or {}).items() if k not in ("causal", *_IDS)}
    given = [find(config, key) for key in (*DFLASH_KEYS, *ID_KEYS)]
    states = next((len(ids) for ids in given if isinstance(ids, list)), 3)
    block["target_layer_ids"] = list(spell(_spread(num_layers, states), AFTER, num_layers))
    kept = {k: v for k, v in config.items() if k not in (*ROPE, *_IDS, "is_causal", "speculators_model_type")}
    named = {"architectures": ["DFlashDraftModel"], "rope_theta": 10_000.0}
    return {**kept, **named, **_depth(names), "dflash_config": block}


_IDS = {key.rpartition(".")[2] for key in (*DFLASH_KEYS, *ID_KEYS)}


def _spread(num_layers: int, states: int) -> tuple[int, ...]:
    """The default triple, or as many points at equal distances."""
    if states == 3:
        return default_points(num_layers)
    return tuple(round(i * num_layers / (states + 1)) for i in range(1, states + 1))


def read_claims(
    checkpoint: Checkpoint,
    pair: Pair,
    target: OpenTarget,
    layer_ids: str | None = None,
    norm_output: str | None = None,
    written_by: str | None = None,
) -> Claims:
    """What the config says, in the words of the caller or of who wrote it where they are given."""
    if written_by is not None and pair.name in DRAFTS:
        reading = read_as(checkpoint, written_by, target.num_layers, target.pair.name)
        if isinstance(reading, Refusal):
            return Claims({}, (), (f"{reading.fact}: {reading.reason}",))
        return Claims(_values([reading.config], pair), (reading.points,) if reading.points else ())
    notes: list[str] = []
    configs = _configs(checkpoint, pair, norm_output, notes)
    points = _points(checkpoint, target.num_layers, layer_ids, notes) if pair.name in (*ARCHITECTURES, "dflash") else ()
    return Claims(_values(configs, pair), points, tuple(notes))


def _configs(checkpoint: Checkpoint, pair: Pair, norm_output: str | None, notes: list[str]) -> list[Any]:
    """Every config that the file can be read as."""
    page = _body(checkpoint, pair)
    given = {} if norm_output is None or pair.name not in ARCHITECTURES else {"norm_output": norm_output}
    try:
        return [page.read_config(checkpoint.config, **given)]
    except (ConfigError, ValueError, TypeError) as error:
        if "norm_output" in str(error):
            return [page.read_config(checkpoint.config, norm_output=word) for word in ("head", "feedback")]
        notes.append(f"config.json: {error}")
        return []


def _values(configs: Sequence[Any], pair: Pair) -> dict[str, tuple[Value, ...]]:
    """The facts of the table that configs say."""
    found: dict[str, tuple[Value, ...]] = {}
    for fact in FACTS:
        if fact.read is not None and pair.name in fact.drafts:
            said = [value for value in map(fact.read, configs) if value is not None]
            if said:
                found[fact.name] = tuple(dict.fromkeys(said))
    return found


def _points(
    checkpoint: Checkpoint, num_layers: int, layer_ids: str | None, notes: list[str]
) -> tuple[tuple[int, ...], ...]:
    try:
        return (resolve(checkpoint.config, num_layers, layer_ids=layer_ids).points,)
    except AmbiguousLayerIds:
        ids = next(ids for ids in (find(checkpoint.config, key) for key in (*DFLASH_KEYS, *ID_KEYS)) if ids)
        return tuple(to_points(ids, word) for word in (AFTER, BEFORE) if is_legal(ids, word, num_layers))
    except CheckpointError as error:
        notes.append(str(error))
        return ()


def edits_of(claims: Claims, draft: OpenDraft, target: OpenTarget) -> list[Edit]:
    """The claimed readings that the table would not try."""
    tried, now = candidates(draft, target), standing(draft)
    found = []
    for fact in FACTS:
        known = {edit.value for edit in tried if edit.fact == fact.name} | {now.get(fact.name)}
        if fact.name in MEASURABLE and fact.name in now:
            found += [edit_of(fact, v, "") for v in claims.values.get(fact.name, ()) if v not in known]
    reached = {edit.apply(draft, target).capture_points for edit in tried if edit.fact in MOVES} | {
        draft.capture_points
    }
    row = next(fact for fact in FACTS if fact.name == POINTS)
    return found + [edit_of(row, points) for points in claims.points if points not in reached]


def hold(claims: Claims, found: Identified) -> list[Claim]:
    """Every claim against what was found."""
    told = [_held(answer, claims.values[answer.fact]) for answer in found.answers if answer.fact in claims.values]
    if claims.points and found.points:
        moved = [one for answer in found.answers if answer.fact in MOVES for one in answer.alternatives]
        told.append(_judge(POINTS, claims.points, found.points, {one.points: one.contrast for one in moved}))
    return told


def _held(answer: Answer, claimed: tuple[Value, ...]) -> Claim:
    return _judge(answer.fact, claimed, answer.value, {one.value: one.contrast for one in answer.alternatives})


def _judge(fact: str, claimed: Sequence[Value], found: Value, contrasts: Mapping[Value, Contrast]) -> Claim:
    """The kindest reading of a claim decides: only where all are worse is it contradicted."""
    if found in claimed:
        return Claim(fact, tuple(claimed), found, AGREES)
    measured = [contrasts[value] for value in claimed if value in contrasts]
    if not measured:
        return Claim(fact, tuple(claimed), found, UNMEASURED)
    kindest = min(measured, key=lambda one: one.nats)
    words = {WORSE: CONTRADICTED, SAME: SAME}
    return Claim(fact, tuple(claimed), found, words.get(kindest.verdict, UNSURE), kindest)
