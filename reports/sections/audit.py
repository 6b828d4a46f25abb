"""Audited checkpoints, one after another: the verdict, what to change, then the evidence."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes

from harness.record import Audit
from reports.drawing import GRID, INK, SERIES, SHEET, Plot, lines, list_rows, plot
from reports.panels import Section, counted
from reports.store import Records

Facts = Mapping[str, Any]
Rows = list[tuple[str, ...]]

TONES = {
    "passed": ("good", "Sound"),
    "failed": ("bad", "Faulty"),
    "misread": ("bad", "Sound, but misread"),
    "unclear": ("unsure", "Not settled"),
}
GRAVEST = ("failed", "unclear", "passed")
SHOWN = 400
"""tensors in the key map; the others are counted"""
RANKS = ("1", "2", "4", "8")
MIB = 2**20
TIMES = "\N{NO-BREAK SPACE}x\N{NO-BREAK SPACE}"
NEAR_ZERO = 0.01
"""nats; up to here the axis of differences is linear, from there on logarithmic"""


class Stand(NamedTuple):
    """One draft and its target, as the template shows them."""

    title: str
    tone: str
    badge: str
    sentence: str
    changes: list[str]
    engines: Rows
    plots: list[Plot]
    facts: Rows
    notes: list[str]
    keys: Rows
    unshown: int
    shards: Rows


def build(now: Records, every: Records) -> Section | None:
    """One part a checkpoint, faulty ones first; nothing where nothing was audited."""
    found = sorted(now.audits, key=lambda a: (GRAVEST.index(a.outcome), a.draft, a.target))
    stands = [stand(audit, place) for place, audit in enumerate(found)]
    return Section("audit", "Audited checkpoints", {"stands": stands}, "Audits", "audit.html") if stands else None


def stand(audit: Audit, place: int) -> Stand:
    """The record of one audit in words, tables and a drawing."""
    tone, badge = TONES["misread" if is_misread(audit) else audit.outcome]
    accounts, engines = audit.facts["accounting"], audit.facts["engines"]
    identified = audit.facts.get("identification", {})
    answers = list(identified.get("facts", ()))
    drawing = forest(f"audit-{place}", answers, identified)
    keys = [key_row(tensor) for tensor in accounts["draft"]["tensors"]]
    return Stand(
        f"{audit.draft} for {audit.target}",
        tone,
        badge,
        sentence(audit, engines, answers),
        changes(audit.facts),
        [engine_row(verdict) for verdict in engines.get("verdicts", ())],
        [drawing] if drawing else [],
        [fact_row(answer) for answer in answers],
        [*(f"Engines: {note}" for note in _some(engines, "note")),
         *(f"Facts: not measured, {note}" for note in _some(identified, "note")),
         *accounts["target"].get("notes", ()), *identified.get("notes", ())],
        keys[:SHOWN],
        len(keys[SHOWN:]),
        shard_rows(accounts),
    )  # fmt: skip


def sentence(audit: Audit, engines: Facts, answers: Sequence[Facts]) -> str:
    """What was found, in one line."""
    tensors = audit.facts["accounting"]["draft"]["tensors"]
    parts = [f"{audit.pair}, {counted(sum(bool(t['tensor']) for t in tensors), 'tensor')} accounted for"]
    verdicts = [verdict["outcome"] for verdict in engines.get("verdicts", ())]
    if verdicts:
        parts.append(f"read as intended by {verdicts.count('as intended')} of {counted(len(verdicts), 'engine')}")
    if answers:
        told = sum(answer["answer"] == "identified" for answer in answers)
        parts.append(f"{told} of {counted(len(answers), 'fact')} identified from its weights")
    faults = audit.facts.get("faults", ())
    found = f"Faults in: {', '.join(faults)}" if faults else "No fault was found"
    if is_misread(audit):
        wrong = [verdict["engine"] for verdict in engines["verdicts"] if verdict["outcome"] == "wrongly"]
        found = f"Its tensors and facts are sound; read wrongly by {', '.join(wrong)}"
    return f"{found}. {'; '.join(parts)}."


def is_misread(audit: Audit) -> bool:
    """Whether all that is wrong is how engines read it."""
    outcomes = [verdict["outcome"] for verdict in audit.facts["engines"].get("verdicts", ())]
    return list(audit.facts.get("faults", ())) == ["engines"] and "wrongly" in outcomes


def changes(facts: Facts) -> list[str]:
    """What its owner should do, gravest first: tensors, then what the config says wrongly, then engine by engine."""
    accounts, engines = facts["accounting"], facts["engines"]
    found = [fault["text"] for side in ("target", "draft") for fault in accounts[side]["faults"]]
    found += accounts.get("join", ())
    claims = facts.get("identification", {}).get("claims", ())
    found += [claim["text"] for claim in claims if claim["verdict"] == "contradicted"]
    found += [f"What the draft means is not settled: {reason}" for reason in _some(engines.get("meant", {}), "refused")]
    wrong = [verdict for verdict in engines.get("verdicts", ()) if verdict["outcome"] == "wrongly"]
    return found + [f"For {verdict['engine']} {verdict['version']}: {verdict['remedy']}" for verdict in wrong]


def engine_row(verdict: Facts) -> tuple[str, ...]:
    """Engine, what it does, what that costs, and what makes it right."""
    what = verdict.get("refused") or "; ".join(
        f"{one['fact']}: {one['read']} in the place of {one['meant']}" for one in verdict["differences"]
    )
    silent = ", in silence" if verdict["silent"] and what else ""
    name = f"{verdict['engine']} {verdict['version']}"
    return name, verdict["outcome"], f"{what}{silent}" or "what is meant", cost(verdict), verdict["remedy"]


def cost(verdict: Facts) -> str:
    """Of a wrong reading: nats a token with their interval, and tokens of acceptance length."""
    found = verdict["cost"]
    if not found:
        return "not measured (audit --costs)" if verdict["outcome"] == "wrongly" else ""
    text = f"{found['nats']:+.3f} nats ({_span(*found['interval'])})"
    if found.get("difference") is None:
        return text
    low, high = found.get("difference_interval") or (None, None)
    return f"{text}; {found['difference']:+.2f} tokens ({_span(low, high, 2)})"


def fact_row(answer: Facts) -> tuple[str, ...]:
    """Fact, value, answer, and the other reading that came closest."""
    one, why = answer["closest"], answer.get("why")
    told = f"{answer['answer']}: {why}" if why else answer["answer"]
    return answer["fact"], str(answer["value"]), told, str(one["value"]), f"{one['nats']:+.4f}", _span(
        one["low"], one["high"], 4)  # fmt: skip


def key_row(tensor: Facts) -> tuple[str, ...]:
    """One tensor of the file, or one parameter without any."""
    shape, dtype = TIMES.join(map(str, tensor["shape"])), tensor["dtype"].removeprefix("torch.")
    why = f"{tensor['status']}: {tensor['reason']}" if tensor["reason"] else tensor["status"]
    return tensor["tensor"] or "none", tensor["parameter"] or "none", why, shape or "not known", dtype or "not known"


def shard_rows(accounts: Facts) -> Rows:
    """What the first of 1, 2, 4 and 8 ranks holds of each parameter of the draft, and of both checkpoints in all."""
    rows = [
        (shard["parameter"] + (f" and {shard['count'] - 1} like it" if shard["count"] > 1 else ""), shard["split"],
         *(_shape(shard["shapes"][ranks]) for ranks in RANKS))
        for shard in accounts["draft"].get("shards", ())
    ]  # fmt: skip
    for side in ("draft", "target"):
        if splits := accounts[side]["splits"]:
            rows.append((f"all of the {side}", "a rank holds", *(_size(splits[ranks]) for ranks in RANKS)))
    return rows


def forest(name: str, answers: Sequence[Facts], identified: Facts) -> Plot | None:
    """How much worse the closest other reading of each fact is, sequence by sequence; None where nothing was read."""
    drawn = [answer for answer in answers if answer["closest"]["low"] is not None]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for place, answer in enumerate(drawn):
            one, is_told = answer["closest"], answer["answer"] == "identified"
            color = SERIES[0] if is_told else SERIES[5]
            axes.plot([one["low"], one["high"]], [place, place], color=color, linewidth=2)
            face = color if is_told else SHEET
            axes.plot(
                [one["nats"]], [place], "o" if is_told else "s", color=color, markersize=5.5, markerfacecolor=face
            )
            axes.annotate(f"{one['nats']:+.3f}", (max(one["high"], 0), place), (7, 0), textcoords="offset points",
                          va="center", color=INK, fontsize=8.5)  # fmt: skip
        axes.axvline(0, color=GRID, linewidth=1)
        axes.set_xscale("symlog", linthresh=NEAR_ZERO, linscale=0.5)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        list_rows(axes, [lines(f"{answer['fact']}: {answer['value']}, not {answer['closest']['value']}", 30)
                         for answer in drawn])  # fmt: skip
        axes.margins(x=0.2)
        axes.set(xlabel="nats a token worse than stated")

    told = "; ".join(
        f"{a['fact']} {a['value']} against {a['closest']['value']}: {a['closest']['nats']:+.4f}, "
        f"{_span(a['closest']['low'], a['closest']['high'], 4)}, {a['answer']}" for a in drawn
    )  # fmt: skip
    note = (
        f"Closest other reading of each fact, paired over {counted(identified['sequences'], 'sequence')} of "
        f"{identified['text']}, 95 % interval. Filled: identified; open: not told apart."
    )
    title = "What the weights say"
    return plot(name, title, f"Forest plot of paired differences. {told}.", note, draw, 0.9 + 0.42 * len(drawn))


def _some(facts: Facts, key: str) -> list[str]:
    return [facts[key]] if facts.get(key) else []


def _span(low: float | None, high: float | None, places: int = 3) -> str:
    if low is None or high is None:
        return "not known"
    return f"{low:+.{places}f} to {high:+.{places}f}"


def _shape(found: Sequence[int] | str) -> str:
    return f"does not divide: {found}" if isinstance(found, str) else TIMES.join(map(str, found))


def _size(found: int | str) -> str:
    return f"not possible: {found}" if isinstance(found, str) else f"{found / MIB:.1f} MiB"
