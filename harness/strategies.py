"""What hypothesis draws: seeds, sizes, ids and patterns; tensors come from a seed, never element by element."""

from dataclasses import dataclass

from hypothesis import strategies as st

from harness.conventions import AFTER, BEFORE, CONVENTIONS, SHIFT

RANKS = (1, 2, 3, 4, 8)
# sizes with a history: multiples of 64 where all layouts agree, and others where they do not
VOCABS = (64, 100, 128, 130, 192, 250, 256, 331, 512, 1000)


@dataclass(frozen=True)
class LayerSpec:
    """Layer ids of a draft for a target of `num_layers` layers, under a convention."""

    num_layers: int
    ids: tuple[int, ...]
    convention: str


@dataclass(frozen=True)
class AcceptanceSpec:
    """How many drafts each verify step of each sequence accepts."""

    num_draft_tokens: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class HeadSpec:
    """Attention heads that split over `ranks`."""

    heads: int
    kv_heads: int
    head_dim: int
    ranks: int


def seeds() -> st.SearchStrategy[int]:
    """Seeds of a torch generator."""
    return st.integers(0, 2**31 - 1)


def ranks() -> st.SearchStrategy[int]:
    """Tensor-parallel sizes."""
    return st.sampled_from(RANKS)


def vocabs(largest: int = 1024) -> st.SearchStrategy[int]:
    """Vocabulary sizes: those with a history, multiples of 64, and any."""
    known = [size for size in VOCABS if size <= largest]
    any_size = st.integers(1, largest)
    if not known:
        return any_size
    return st.one_of(st.sampled_from(known), st.integers(1, largest // 64).map(lambda k: 64 * k), any_size)


@st.composite
def layer_specs(draw: st.DrawFn, min_layers: int = 7, max_layers: int = 64, max_ids: int = 5) -> LayerSpec:
    """Distinct legal ids in any order, both ends of the range included."""
    num_layers = draw(st.integers(min_layers, max_layers))
    convention = draw(st.sampled_from(CONVENTIONS))
    last = num_layers - SHIFT[convention]
    ids = draw(st.lists(st.integers(0, last), min_size=1, max_size=min(max_ids, last + 1), unique=True))
    return LayerSpec(num_layers, tuple(ids), convention)


@st.composite
def ambiguous_layer_specs(draw: st.DrawFn, min_layers: int = 7, max_layers: int = 64) -> LayerSpec:
    """Ids that are legal in both conventions; the convention is the one that was meant."""
    num_layers = draw(st.integers(min_layers, max_layers))
    ids = draw(st.lists(st.integers(0, num_layers - 1), min_size=1, max_size=5, unique=True))
    return LayerSpec(num_layers, tuple(ids), draw(st.sampled_from((AFTER, BEFORE))))


@st.composite
def acceptance_patterns(
    draw: st.DrawFn, max_batch: int = 4, max_steps: int = 6, max_draft_tokens: int = 5
) -> AcceptanceSpec:
    """Accepted counts per sequence and step; all, none and mixed are all likely."""
    num_draft_tokens = draw(st.integers(1, max_draft_tokens))
    one = st.one_of(st.just(0), st.just(num_draft_tokens), st.integers(0, num_draft_tokens))
    row = st.lists(one, min_size=1, max_size=max_steps).map(tuple)
    rows = draw(st.lists(row, min_size=1, max_size=max_batch))
    return AcceptanceSpec(num_draft_tokens, tuple(rows))


@st.composite
def head_specs(draw: st.DrawFn, max_head_dim: int = 8) -> HeadSpec:
    """Heads and key/value heads that a number of ranks can share, replicated key/value heads included."""
    size = draw(ranks())
    divisors = [g for g in range(1, size + 1) if size % g == 0]
    kv_heads = draw(st.one_of(st.sampled_from(divisors), st.integers(1, 3).map(lambda k: k * size)))
    group = draw(st.integers(1, 3))
    heads = kv_heads * group
    if heads % size:
        heads *= size
    return HeadSpec(heads, kv_heads, draw(st.integers(1, max_head_dim)), size)
