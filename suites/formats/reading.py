"""What one consumer would make of an EAGLE-3 checkpoint: from headers and config alone, by the rows of its dialect."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from harness.checkpoints import CONFIG, Checkpoint, CheckpointError
from harness.conventions import AFTER, BEFORE, DEFAULT, SHIFT, default_points, resolve
from harness.pairs import Pair
from reference.config import ConfigError
from reference.drafts.eagle3 import CHECKPOINT_NAMES
from suites.algorithms import find_pair
from suites.catalog import PAIRS
from suites.dialects import DIALECTS, DRAFTPROOF
from suites.formats.places import BODY, find, flat, places_of
from suites.formats.rows import (
    ANY,
    ASCENDING,
    FIRST_ID,
    FIXED,
    FLAGS,
    KIND,
    LAST_ID,
    NEEDED,
    NO_Q_LORA,
    NO_T2D,
    ONCE,
    OWN,
    READ,
    REFUSED,
    TARGETS,
    TRANSLATED,
    UNREAD,
    Dialect,
    Row,
)
from suites.shells import wanted_of

DRAFTS = ("eagle3", "eagle3_mla")
"""pairs whose checkpoints the table speaks of"""

NARROWING = (NO_T2D, NO_Q_LORA)
"""places whose rows take away a tensor that has a parameter"""

EVERYWHERE = ("t2d", "layers.[1-9]*.hidden_norm.weight", "layers.[1-9]*.input_layernorm.weight")
"""parameters that some layouts have and no forward pass reads: neither their presence nor their absence is a fault"""


@dataclass(frozen=True)
class Refusal:
    """A consumer that stops, and what it stops at."""

    dialect: str
    fact: str
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Reading:
    """Everything that a consumer would run with."""

    dialect: str
    pair: Pair
    config: Any
    points: tuple[int, ...]
    """capture points in the order in which `fc` meets them; none where the draft reads the final hidden state"""
    source: Mapping[str, str]
    """our parameter -> the tensor that it is loaded from"""
    filled: Mapping[str, str]
    """our parameter -> what stands there instead of a tensor"""
    dropped: Mapping[str, str]
    """tensor -> how a user hears of it: silent or warns"""
    embedding: str = OWN
    skips_fc: bool = False
    captures: str = "the residual stream"
    embedding_scale: str = "raw rows"
    decided: Mapping[str, Row] = field(default_factory=dict)
    """fact -> the row that settled it"""


class _Stop(Exception):
    """A refusal on its way out."""

    def __init__(self, fact: str, reason: str, source: str = "") -> None:
        super().__init__(reason)
        self.fact, self.reason, self.source = fact, reason, source


def read_as(
    checkpoint: Checkpoint, dialect: str, num_layers: int, target: str = "llama", places: Iterable[str] = ()
) -> Reading | Refusal:
    """How a consumer would read a draft beside a target of `num_layers` layers.

    target   pair of the target, for consumers whose targets differ in what they capture
    places   more circumstances that rows name, such as "images in the prompt"
    errors: CheckpointError where the draft is none that the table speaks of
    """
    pair = PAIRS[find_pair(checkpoint, "draft")]
    if pair.name not in DRAFTS:
        raise CheckpointError(f"{checkpoint.path}: the table of dialects speaks of EAGLE-3 drafts, this is {pair.name}")
    held = (*places_of(checkpoint, pair, target), *places)
    try:
        return _Reader(checkpoint, DIALECTS[dialect], pair, num_layers, held).read()
    except _Stop as stop:
        return Refusal(dialect, stop.fact, stop.reason, stop.source)
    except (ConfigError, ValueError, TypeError) as error:
        # values of another kind than any consumer can use
        return Refusal(dialect, "config", f"{CONFIG}: {error}")


class _Reader:
    """One checkpoint in the hands of one consumer."""

    def __init__(
        self, checkpoint: Checkpoint, dialect: Dialect, pair: Pair, num_layers: int, places: Sequence[str]
    ) -> None:
        self.checkpoint, self.dialect, self.pair = checkpoint, dialect, pair
        self.num_layers, self.places = num_layers, tuple(places)
        self.seen: Mapping[str, Any] = checkpoint.config
        self.decided: dict[str, Row] = {}

    def about(self, fact: str) -> tuple[Row, ...]:
        return self.dialect.about(fact, self.places)

    def stop(self, row: Row, reason: str) -> _Stop:
        return _Stop(row.fact, reason, row.source)

    def read(self) -> Reading:
        """Every fact in the order in which a consumer meets them."""
        for row in self.about("target"):
            raise self.stop(row, "the consumer captures nothing from this target")
        if self.dialect.name == DRAFTPROOF:
            config = self.pair.read_config(self.seen)
            points, skips = self.stated_points(config), False
        else:
            self.seen = self.layout()
            self.architecture()
            config = self.config()
            points = self.points(config)
            skips = bool(self.about("one narrow state")) and config.aux_states * config.aux_width == config.hidden
        source, filled, dropped = self.tensors(config)
        return Reading(
            self.dialect.name, self.pair, config, points, source, filled, dropped,
            self.embedding(source), skips and config.use_aux_hidden_state,
            self.word("captures", "the residual stream"), self.word("embedding scale", "raw rows"), self.decided,
        )  # fmt: skip

    def word(self, fact: str, usual: str) -> str:
        rows = self.about(fact)
        if not rows:
            return usual
        self.decided[fact] = rows[0]
        return rows[0].means if fact == "captures" else str(rows[0].absent)

    def layout(self) -> Mapping[str, Any]:
        """The config as far as the consumer sees it."""
        rows, nested = self.about("layout"), KIND in self.checkpoint.config
        for row in rows:
            if nested and row.means == UNREAD:
                raise self.stop(row, f"{KIND} and the nested transformer_layer_config are unknown to it")
            if row.means == NEEDED and find(self.checkpoint.config, row.key) is None:
                raise self.stop(row, f"{row.key} is missing: it knows its own layout by this key")
        if nested and any(row.means == TRANSLATED for row in rows):
            inner, outer = self.checkpoint.config.get("transformer_layer_config") or {}, self.checkpoint.config
            kept = ("draft_vocab_size", "target_hidden_size", "norm_before_residual", "norm_before_fc", "fc_norm",
                    "norm_output", "eagle_aux_hidden_state_layer_ids")  # fmt: skip
            return {**inner, **{key: outer[key] for key in kept if outer.get(key) is not None}}
        return flat(self.checkpoint.config)

    def architecture(self) -> None:
        row = self.about("architecture")[0]
        names = self.checkpoint.config.get("architectures") or ["absent"]
        if row.means != ANY and not set(map(str, names)) & set(row.means.split()):
            raise self.stop(row, f"architecture {', '.join(map(str, names))} is not registered; it knows {row.means}")

    def value(self, fact: str) -> tuple[bool, Any]:
        """(whether the table has the fact, what the consumer takes it to be)."""
        rows = self.about(fact)
        for row in rows:
            self.decided[fact] = row
            if row.means in (UNREAD, FIXED):
                return True, row.absent
            value = find(self.seen, row.key)
            if row.means == READ and value is not None:
                return True, len(value) if fact == "aux states" and isinstance(value, list | tuple) else value
        return bool(rows), rows[0].absent if rows else None

    def config(self) -> Any:
        """The frozen config that the consumer's model would have."""
        body = {key: self.seen[key] for key in BODY if key in self.seen}
        body["tie_word_embeddings"] = False
        # what stands in the body and what has rows is set below, after the body is read
        layers = self.value("layers")[1]
        if "layer_types" in body and len(body["layer_types"] or ()) != layers:
            del body["layer_types"]
        body["num_hidden_layers"] = layers
        for key, fact in (("target_hidden_size", "target_hidden"), ("draft_vocab_size", "")):
            if body.get(key) is None or (fact and not self.value(fact)[1]):
                body.pop(key, None)
        config = self.pair.read_config(body)
        names = {f.name for f in dataclasses.fields(config)} & FLAGS.keys() - {"layers", "target_hidden", "head_dim"}
        facts = {name: self.flag(name) for name in sorted(names) if self.about(name)}
        if hasattr(config, "head_dim"):
            own = self.value("head_dim")[1]
            facts["head_dim"] = own if isinstance(own, int) else config.hidden // config.heads
        count = self.value("aux states")[1]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ConfigError(f"the number of aux states is {count!r}")
        theta = self.about("rope theta")
        if theta and theta[0].means == UNREAD:
            self.decided["rope theta"] = theta[0]
            facts["rope"] = dataclasses.replace(config.rope, theta=theta[0].absent)
        return dataclasses.replace(config, **facts, aux_states=count)

    def flag(self, name: str) -> Any:
        """A flag or a number of the table; ConfigError where the file has another kind of value."""
        value, usual = self.value(name)[1], FLAGS[name][1]
        kinds = int | float if isinstance(usual, float) else type(usual)
        if not isinstance(value, kinds):
            raise ConfigError(f"config key {self.decided[name].key!r} is {value!r}; like {usual!r} is expected")
        return value

    def stated_points(self, config: Any) -> tuple[int, ...]:
        if not config.use_aux_hidden_state:
            return ()
        try:
            return resolve(self.seen, self.num_layers).points
        except CheckpointError as error:
            raise _Stop("layer ids", str(error), "harness/conventions.py") from error

    def points(self, config: Any) -> tuple[int, ...]:
        """What the consumer captures, in its order."""
        if not config.use_aux_hidden_state:
            return ()
        row, points = self.named_points()
        self.decided["layer ids"] = row
        for order in self.about("order")[:1]:
            self.decided["order"] = order
            points = sorted(set(points)) if order.means == ONCE else points
            points = sorted(points) if order.means == ASCENDING else points
        for closed in self.about("capture point"):
            closed_point = self.num_layers if closed.key == "L" else int(closed.key)
            if closed.means == READ:
                break
            if closed_point in points:
                raise self.stop(closed, f"capture point {closed_point} of {self.num_layers} is out of its reach")
        legal = [c for c in points if 0 <= c <= self.num_layers]
        if len(legal) != config.aux_states:
            raise self.stop(row, f"captures {tuple(legal)}: {len(legal)} states, `fc` reads {config.aux_states}")
        return tuple(legal)

    def named_points(self) -> tuple[Row, list[int]]:
        for row in self.about("layer ids"):
            ids = find(self.seen, row.key)
            if row.means == DEFAULT:
                return row, list(default_points(self.num_layers))
            if isinstance(ids, list | tuple) and ids and all(isinstance(i, int) for i in ids):
                return row, [i + SHIFT[self.convention(row, ids)] for i in ids]
        raise AssertionError("every table ends in the default triple")

    def convention(self, row: Row, ids: Sequence[int]) -> str:
        if row.means == FIRST_ID:
            return AFTER if ids[0] == 1 else BEFORE
        if row.means == LAST_ID:
            return BEFORE if max(ids) == self.num_layers else AFTER
        return row.means

    def ours(self, tensor: str) -> str:
        """Our name of a tensor; a name of no parameter where the consumer has no place for its spelling."""
        if self.dialect.name == DRAFTPROOF:
            table = CHECKPOINT_NAMES
            for theirs, mine in table:
                tensor = mine + tensor[len(theirs) :] if tensor.startswith(theirs) else tensor
            return tensor
        rows = self.about("name")
        narrow = [row for row in rows if row.where] or rows
        spelled = tensor.removeprefix("model.") if any(row.key == "model." for row in narrow) else tensor
        for row in narrow:
            if row.key and spelled.startswith(row.key):
                return row.absent + spelled[len(row.key) :]
        return "unknown " + spelled if spelled.startswith("layers.0.") else spelled

    def tensors(self, config: Any) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
        """Where each parameter comes from, what fills the others, and which tensors go unread."""
        wanted = wanted_of(self.pair, config, len(self.checkpoint.headers))
        source: dict[str, str] = {}
        dropped: dict[str, str] = {}
        for tensor, header in self.checkpoint.headers.items():
            name = self.ours(tensor)
            rule = self.rule("tensor", name)
            narrowed = rule is not None and rule.where in NARROWING
            if name in wanted and not narrowed:
                if header.shape != wanted[name]:
                    what = f"{tensor} is {list(header.shape)}, its place is {list(wanted[name])}"
                    raise _Stop("shape", what, "")
                source[name] = tensor
            elif not any(fnmatchcase(name, pattern) for pattern in (*EVERYWHERE, "verifier_*" if self.own else "")):
                if rule is None or rule.means == REFUSED:
                    raise _Stop("tensor", f"{tensor} has no place", rule.source if rule else "")
                dropped[tensor] = rule.manner
        return source, self.fill(config, wanted, source), dropped

    @property
    def own(self) -> bool:
        """Whether tensors that a trainer keeps for its loss are known as such."""
        return self.dialect.role == "trainer"

    def fill(self, config: Any, wanted: Mapping[str, Any], source: Mapping[str, str]) -> dict[str, str]:
        filled = {}
        whole = config.draft_vocab == config.vocab
        for name in wanted:
            if name in source or name == "t2d" or (name == "d2t" and whole):
                continue
            row = self.rule("missing", name)
            if row is None or row.means == REFUSED:
                raise _Stop("missing", f"{name} is missing", row.source if row else "")
            filled[name] = row.means
            self.decided[f"missing {name}"] = row
        return filled

    def rule(self, fact: str, name: str) -> Row | None:
        return next((row for row in self.about(fact) if fnmatchcase(name, row.key)), None)

    def embedding(self, source: Mapping[str, str]) -> str:
        row = self.about("embedding")[0]
        self.decided["embedding"] = row
        # a table of another width cannot be the target's
        other_width = self.seen.get("target_hidden_size") not in (None, self.seen.get("hidden_size"))
        return OWN if "embed_tokens.weight" in source and (row.means == OWN or other_width) else TARGETS
