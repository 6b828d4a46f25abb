"""A summary for a pull request in GitHub's Markdown: verdict, failures, what moved, what did not run."""

import re
from collections.abc import Sequence

from reports.newest import newest
from reports.panels import counted, place_of
from reports.sections import compared, ledger, rig, verdict
from reports.sections.comparable import warnings
from reports.sections.failures import failures
from reports.store import Records

SHOWN = 30
"""rows of a table; a comment on a pull request is short"""
SIGNS = {"good": ":white_check_mark:", "bad": ":x:", "unsure": ":grey_question:"}


def summary(records: Records) -> str:
    """The same facts as the page, in its order, without plots."""
    now = newest(records)
    told = verdict.headline(now)
    lines = [f"## {SIGNS[told.tone]} {_text(told.sentence)}", "", _text(told.then), *_code(told.command)]
    found = warnings(records)
    if found:
        lines = ["> [!WARNING]", "> These runs measured the same thing under different conditions:",
                 *(f"> - {_text(line)}" for line in found), "", *lines]  # fmt: skip
    return "\n".join([*lines, *_failures(now), *_moved(now), *_owed(now), *_machine(now)]) + "\n"


def _failures(now: Records) -> list[str]:
    """Each failure with the line that runs it again."""
    found = failures(now)
    lines = ["", f"### {counted(len(found), 'failure')}", ""] if found else []
    for card in found[:SHOWN]:
        pair = f" on {_text(card.check.pair)}" if card.check.pair else ""
        why = card.explanation or card.check.reason
        lines += [
            f"- **{_text(place_of(card.check.claim))}**{pair}: {_text(why)}",
            *(f"  {line}" for line in _code(card.replay)),
        ]
    return [*lines, *_more(len(found))]


def _moved(now: Records) -> list[str]:
    """Verdicts other than SAME, gravest first; how many are."""
    found = [v for v in compared.ordered(now.verdicts) if v.verdict != "SAME"]
    if not now.verdicts:
        return []
    rows = [(v.verdict, f"{v.pair} {v.metric}", compared.size(v, v.effect), compared.span_of(v), "; ".join(v.reasons))
            for v in found[:SHOWN]]  # fmt: skip
    head = ("verdict", "metric", "effect", "95 % interval", "why")
    same = f"{len(now.verdicts) - len(found)} of {counted(len(now.verdicts), 'comparison')} ended SAME."
    return ["", "### Compared with the baseline", "", same, *_table(head, rows), *_more(len(found))]


def _owed(now: Records) -> list[str]:
    found = ledger.debts(now)
    rows = [(owed.what, str(owed.times or "all"), owed.why) for owed in found[:SHOWN]]
    return ["", "### What did not run", *_table(("what", "count", "why"), rows), *_more(len(found))] if found else []


def _machine(now: Records) -> list[str]:
    facts = dict(rig.rig(now))
    return ["", " - ".join(_text(facts[name]) for name in ("commit", "processor", "GPU") if name in facts)]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Nothing where there is no row."""
    if not rows:
        return []
    cells = [[_text(cell) for cell in row] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells))]


def _more(number: int) -> list[str]:
    return ["", f"{number - SHOWN} more are in the record."] if number > SHOWN else []


def _code(command: str) -> list[str]:
    """A fenced line; the fence is longer than any run of backticks inside."""
    longest = max(map(len, re.findall("`+", command)), default=0)
    fence = "`" * max(3, longest + 1)
    return ["", fence, " ".join(command.split()), fence] if command else []


def _text(words: str) -> str:
    """On one line, with nothing that Markdown or HTML reads as its own."""
    plain = re.sub(r"([\\|`*_\[\]#])", r"\\\1", " ".join(words.split()))
    # an at sign would call somebody
    return plain.replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
