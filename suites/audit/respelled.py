"""Copies of a draft whose config says the same in other words, or something else: the weights are the original's.

Honest copies are written by `suites/formats/writing.py` in every dialect that has words for the draft, or spelled anew
by hand where the table of dialects does not reach. Each lie changes one claim and bears the name of the fact.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoints import Checkpoint, save_checkpoint
from harness.conventions import BEFORE, STATED_KEY
from suites.audit.identify import POINTS
from suites.dialects import DIALECTS, DRAFTPROOF
from suites.formats.places import find
from suites.formats.reading import DRAFTS, Refusal, read_as
from suites.formats.rows import NESTED
from suites.formats.writing import DialectError, convert, put, write_as

Config = dict[str, Any]
DFLASH_IDS = "dflash_config.target_layer_ids"
ROPES = "text_config.rope_parameters"
FULL, SLIDING = f"{ROPES}.full_attention", f"{ROPES}.sliding_attention"


@dataclass(frozen=True)
class Copy:
    """One way to write a draft again."""

    name: str
    lie: str = ""
    """the fact that its config says otherwise; "" for an honest copy"""
    change: Callable[[Config], None] = lambda config: None
    dialect: str = ""
    names: tuple[str, str] = ("", "")
    """(a prefix of tensor names, what stands there instead)"""

    def write(self, source: Checkpoint, folder: Path, num_layers: int, target: str) -> Path:
        """Write it; num_layers and target: those of the target, which layer ids are counted in."""
        if self.dialect:
            meant = read_as(source, DRAFTPROOF, num_layers, target)
            assert not isinstance(meant, Refusal)
            convert(source, folder, self.dialect, meant, num_layers, target)
            return folder
        config = deepcopy(source.config)
        self.change(config)
        save_checkpoint(folder, config, {self._named(name): source.read(name) for name in source.headers})
        return folder

    def _named(self, tensor: str) -> str:
        old, new = self.names
        return new + tensor.removeprefix(old) if tensor.startswith(old) else tensor


def copies(source: Checkpoint, pair: str, num_layers: int, target: str) -> list[Copy]:
    """Every copy of a draft of this pair."""
    return [*(_dialects(source, num_layers, target) if pair in DRAFTS else []), *BY_PAIR[pair](source.config)]


def _dialects(source: Checkpoint, num_layers: int, target: str) -> list[Copy]:
    """The dialects that have words for it."""
    meant, found = read_as(source, DRAFTPROOF, num_layers, target), []
    assert not isinstance(meant, Refusal)
    for name in DIALECTS:
        try:
            write_as(meant, source, name, num_layers, target)
        except DialectError:
            continue
        found.append(Copy(f"as {name}", dialect=name))
    return found


def says(key: str, value: Any) -> Callable[[Config], None]:
    """A config with another value."""
    return lambda config: put(config, key, value)


def flipped(key: str, usual: bool) -> Callable[[Config], None]:
    """A config with a flag turned over; usual: what it is where the key is absent."""
    return lambda config: put(config, key, not (usual if find(config, key) is None else find(config, key)))


def moved(key: str, by: Callable[[list[int]], Sequence[int]]) -> Callable[[Config], None]:
    """A config with other layer ids."""
    return lambda config: put(config, key, list(by(find(config, key))))


def _both(*changes: Callable[[Config], None]) -> Callable[[Config], None]:
    def change(config: Config) -> None:
        for one in changes:
            one(config)

    return change


def _ropes() -> list[Copy]:
    """Lies about rope, and the truth in the newer spelling."""

    def newer(config: Config) -> None:
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}

    stretched = {"rope_type": "linear", "factor": 2.0}
    return [
        Copy("rope base of 500000", "rope theta", says("rope_theta", 500_000.0)),
        Copy("rope base of a million", "rope theta", says("rope_theta", 1_000_000.0)),
        Copy("rope stretched", "rope scaling", says("rope_scaling", stretched)),
        Copy("rope stretched further", "rope scaling", says("rope_scaling", {**stretched, "factor": 4.0})),
        Copy("rope in its newer spelling", "", newer),
    ]


def _ids(key: str) -> list[Copy]:
    return [
        Copy("ids one further", POINTS, moved(key, lambda ids: [i + 1 for i in ids])),
        Copy("ids one short", POINTS, moved(key, lambda ids: [i - 1 for i in ids])),
        Copy("ids in reverse", POINTS, moved(key, lambda ids: ids[::-1])),
    ]


def _eagle3(config: Config) -> list[Copy]:
    stated = _both(flipped("eagle_config.norm_before_head", True), flipped("eagle_config.feedback_normed", False))
    head = _both(stated, flipped("eagle_config.feedback_normed", False))
    feedback = _both(stated, flipped("eagle_config.norm_before_head", True))
    recurrent = [] if "ptd_token_id" in config else [Copy("the other feedback", "feedback_normed", feedback)]
    layers = [Copy("one layer", "draft layers", says("num_hidden_layers", 1))] if recurrent == [] else []
    return [
        Copy("ids before layers", POINTS, says(STATED_KEY, BEFORE)),
        *_ids(NESTED),
        Copy("the other residual", "norm_before_residual", flipped("norm_before_residual", False)),
        Copy("the other norm of states", "fc_norm", flipped("fc_norm", False)),
        Copy("no norm before the head", "norm_before_head", head),
        *recurrent,
        *layers,
        *_ropes(),
    ]


def _dflash(config: Config) -> list[Copy]:
    causal = Copy("a causal block", "causal block", says("dflash_config.causal", True))
    top = Copy("its ids at the top", "", lambda config: put(config, "target_layer_ids", find(config, DFLASH_IDS)))
    layers = Copy("one layer", "draft layers", says("num_hidden_layers", 1))
    prefixed = Copy("its names under a module", names=("", "model."))
    return [*_ids(DFLASH_IDS), prefixed, causal, layers, top, *_ropes()]


def _mtp(config: Config) -> list[Copy]:
    chosen = config["num_experts_per_tok"]
    return [
        Copy("an expert fewer", "experts a token", says("num_experts_per_tok", chosen - 1)),
        Copy("all experts", "experts a token", says("num_experts_per_tok", config["num_experts"])),
        Copy("weights of experts as they are", "norm_topk_prob", flipped("norm_topk_prob", False)),
        Copy("its names under the target's", names=("mtp.", "model.mtp.")),
        *_ropes(),
    ]


def _assistant(config: Config) -> list[Copy]:
    plain = {"rope_type": "default", "rope_theta": 10_000.0}
    partial = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}
    honest = _both(says(SLIDING, plain), says(FULL, partial))

    def sliding(**rope: Any) -> Callable[[Config], None]:
        return _both(honest, says(SLIDING, {**plain, **rope}))

    return [
        Copy("sliding base of 500000", "rope of sliding layers", sliding(rope_theta=500_000.0)),
        Copy("sliding base of a million", "rope of sliding layers", sliding(rope_theta=1_000_000.0)),
        Copy("sliding layers turned in part", "rope of sliding layers",
             sliding(rope_type="proportional", partial_rotary_factor=0.25)),
        Copy("sliding layers stretched", "rope of sliding layers", sliding(rope_type="linear", factor=2.0)),
        Copy("full layers as sliding ones", "rope of full layers", _both(honest, says(FULL, plain))),
        Copy("a low softcap", "softcap", says("text_config.final_logit_softcapping", 5.0)),
        Copy("its ropes written out", "", honest),
        Copy("its head tied by the body too", "", says("text_config.tie_word_embeddings", True)),
        Copy("its names without a module", names=("model.", "")),
    ]  # fmt: skip


def _standalone(config: Config) -> list[Copy]:
    layers = Copy("a layer fewer", "draft layers", says("num_hidden_layers", config["num_hidden_layers"] - 1))
    bias = Copy("no biases, in words", "", says("mlp_bias", False))
    return [layers, bias, Copy("its names without a module", names=("model.", "")), *_ropes()]


BY_PAIR: dict[str, Callable[[Config], list[Copy]]] = {
    "eagle3": _eagle3,
    "eagle3_mla": _eagle3,
    "peagle": _eagle3,
    "dflash": _dflash,
    "qwen3_moe_mtp": _mtp,
    "gemma4_assistant": _assistant,
    "standalone": _standalone,
}
