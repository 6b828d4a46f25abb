"""Shard maps: which rank holds which part of each weight, from the plan that an audit applied."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from reports.drawing import MUTED, SERIES, SHEET, Plot, list_rows, plot
from reports.panels import Panel, Section, counted, panels
from reports.store import Records

RANKS, DRAWN, ROWS = 4, 6, 24
"""ranks of a map, maps on the page, weights in a map"""


class Slice(NamedTuple):
    """A run of the split dimension and the ranks that hold it."""

    start: int
    stop: int
    ranks: tuple[int, ...]
    """none: a gap"""


def build(now: Records, every: Records) -> Section | None:
    """A map a checkpoint, each once; nothing where nothing was audited."""
    found: dict[str, Sequence[Mapping[str, Any]]] = {}
    for audit in now.audits:
        for side, name in (("target", audit.target), ("draft", audit.draft)):
            shards = audit.facts["accounting"][side].get("shards") or ()
            if any(shard["split"] != "replicated" for shard in shards):
                found.setdefault(name, shards)
    shown = list(found.items())[:DRAWN]
    if not shown:
        return None
    plots = tuple(shard_map(f"shards-{i}", name, shards) for i, (name, shards) in enumerate(shown, 1))
    note = f"The dimension that is split, from its first index to its last, over {RANKS} ranks."
    more = f" {len(found) - len(shown)} more checkpoints are in the records." if len(found) > len(shown) else ""
    return panels("shards", "Shard maps", Panel("", (), (), plots, "", note + more), link="Shards")


def shard_map(name: str, title: str, shards: Sequence[Mapping[str, Any]]) -> Plot:
    """One bar a weight, one part a rank; a red cross where it cannot be split."""
    split = [shard for shard in shards if shard["split"] != "replicated"]
    rows = [(shard, slices(shard)) for shard in split[:ROWS]]

    def draw(axes: Axes) -> None:
        for i, (_, parts) in enumerate(rows):
            if isinstance(parts, str):
                axes.plot([0.02], [i], "X", color=SERIES[1], markersize=7)
                continue
            whole = max(part.stop for part in parts)
            for part in parts:
                share, at = (part.stop - part.start) / whole, part.start / whole
                color = SERIES[part.ranks[0] % len(SERIES)] if part.ranks else SERIES[1]
                hatch = None if part.ranks else "xx"
                axes.barh(i, share, 0.62, at, color=color, edgecolor=SHEET, hatch=hatch)
                words = ", ".join(map(str, part.ranks)) or "nobody"
                axes.text(at + share / 2, i, words, ha="center", va="center", fontsize=8, color=SHEET)
        list_rows(axes, [f"{_short(shard['parameter'])}, {shard['split']}" for shard, _ in rows])
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], ["first", "", "last"], color=MUTED)

    copies = sum(shard["count"] for shard in shards if shard["split"] == "replicated")
    broken = [f"{shard['parameter']}: {parts}" for shard, parts in rows if isinstance(parts, str)]
    told = "; ".join(f"{shard['parameter']}, {shard['split']}: {_words(parts)}" for shard, parts in rows)
    note = f"{counted(copies, 'weight')} more {'is' if copies == 1 else 'are'} on every rank."
    note += f" {len(split) - len(rows)} more split weights are not drawn." if len(split) > len(rows) else ""
    note += f" Cannot be split: {'; '.join(broken)}." if broken else ""
    return plot(name, title, f"Map of weights over {RANKS} ranks. {told}.", note, draw, 0.7 + 0.3 * len(rows))


def slices(shard: Mapping[str, Any]) -> list[Slice] | str:
    """Who holds what of a weight, in order; why not where it does not split."""
    whole, held = (shard["shapes"][str(ranks)] for ranks in (1, RANKS))
    if isinstance(held, str):
        return held
    dim = next((i for i, (a, b) in enumerate(zip(whole, held, strict=True)) if a != b), 0)
    size, each = int(whole[dim]), int(held[dim])
    # heads that are fewer than the ranks have copies on neighbours; a padded vocabulary has empty rows instead
    copies = RANKS * each // size if shard["split"] == "heads" and RANKS * each > size else 1
    found: dict[int, Slice] = {}
    for rank in range(RANKS):
        start = rank // copies * each
        if start < size:
            before = found.get(start, Slice(start, min(start + each, size), ()))
            found[start] = before._replace(ranks=(*before.ranks, rank))
    end = max(part.stop for part in found.values())
    return [*found.values(), *([Slice(end, size, ())] if end < size else [])]


def _words(parts: list[Slice] | str) -> str:
    if isinstance(parts, str):
        return parts
    return ", ".join(f"{p.start} to {p.stop - 1} on {' and '.join(map(str, p.ranks)) or 'nobody'}" for p in parts)


def _short(parameter: str) -> str:
    """The last names of a parameter, without those that all share."""
    parts = [part for part in parameter.split(".") if part not in ("weight", "layers", "layer") and not part.isdigit()]
    return ".".join(parts[-2:]) or parameter
