"""Bisect: how likely each candidate is the culprit, and every look that says so."""

from matplotlib.axes import Axes

from harness.record import Bisection, Probe
from reports.drawing import INK, SERIES, Plot, list_rows, plot
from reports.panels import Panel, Section, counted, panels
from reports.store import Records

DRAWN = 20
"""candidates in a plot: those around the likeliest"""
SHORT = 10
"""letters of a commit"""
MARKS = {"good": ("o", SERIES[2]), "bad": ("X", SERIES[1]), "untestable": ("s", SERIES[5]), "unclear": ("D", SERIES[5])}
"""of an answer: form and colour"""
ENDS = {
    "open": "The search is not finished; draftproof bisect --resume {run} goes on.",
    "found": "Found with a probability of {confidence}.",
    "narrowed": "No look that is left can tell these apart: {culprits}.",
    "not_reproduced": "The two ends do not differ tonight, so nothing was searched.",
    "out_of_budget": "The budget ended first; draftproof bisect --resume {run} goes on.",
}


def build(now: Records, every: Records) -> Section | None:
    """A panel a search, the newest first; nothing where nothing was searched."""
    last = {found.run: found for found in every.bisections}
    if not last:
        return None
    newest = sorted(last.values(), key=lambda found: found.run, reverse=True)
    shown = [
        search(f"posterior-{i}", one, [p for p in every.probes if p.run == one.run]) for i, one in enumerate(newest, 1)
    ]
    return panels("bisect", "Bisect", *shown, row="Looked at")


def search(name: str, found: Bisection, probes: list[Probe]) -> Panel:
    """The answer in words, the posterior, and a row a look."""
    titles = dict(found.candidates)
    told = ", ".join(f"{_short(c)} {titles.get(c, '')}".strip() for c in found.culprits)
    confidence = "not known" if found.confidence is None else f"{found.confidence:.1%}"
    end = ENDS[found.status].format(run=found.run, confidence=confidence, culprits=told)
    title = f"{told}: the culprit" if found.status == "found" else found.status.replace("_", " ").capitalize()
    note = f"{found.question}. {end} {counted(found.num_probes or len(probes), 'look')}" \
           f"{'' if found.error_rates is None else _rates(found.error_rates)}. {found.reason}".strip()  # fmt: skip
    rows = tuple(
        (_short(p.candidate), p.answer, "" if p.value is None else f"{p.value:+.3g}", f"{titles.get(p.candidate, '')}",
         p.reason[:200])
        for p in probes
    )  # fmt: skip
    head = ("", "answer", "moved by", "candidate", "what was seen")
    return Panel("", head, rows, posterior(name, found, probes), title, note, folded=True, words=True)


def posterior(name: str, found: Bisection, probes: list[Probe]) -> tuple[Plot, ...]:
    """A bar a candidate around the likeliest, and a mark a look."""
    if not found.posterior:
        return ()
    best = max(range(len(found.posterior)), key=lambda i: found.posterior[i])
    first = max(0, min(best - DRAWN // 2, len(found.posterior) - DRAWN))
    window = range(first, min(first + DRAWN, len(found.posterior)))
    looks = {
        found.candidates[i][0]: [p.answer for p in probes if p.candidate == found.candidates[i][0]] for i in window
    }

    def draw(axes: Axes) -> None:
        for row, i in enumerate(window):
            axes.barh(row, found.posterior[i], 0.6, color=SERIES[0], linewidth=0)
            axes.annotate(f"{found.posterior[i]:.1%}", (found.posterior[i], row), (4, 0), textcoords="offset points",
                          va="center", fontsize=8, color=INK)  # fmt: skip
            for place, answer in enumerate(looks[found.candidates[i][0]]):
                form, color = MARKS[answer]
                axes.plot([-0.03 - 0.035 * place], [row], form, color=color, clip_on=False, markersize=5)
        most = max(map(len, looks.values()))
        axes.set_xlim(-0.05 - 0.035 * most, 1.12)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
        list_rows(axes, [f"{_short(c)} {title[:24]}" for c, title in (found.candidates[i] for i in window)])
        axes.set(xlabel="probability of being the culprit")

    told = "; ".join(
        f"{_short(c)} {found.posterior[i]:.1%}, {len(looks[c])} looks"
        for i, (c, _) in ((i, found.candidates[i]) for i in window)
    )
    rest = (
        f" {len(found.posterior) - len(window)} more candidates are not drawn."
        if len(window) < len(found.posterior)
        else ""
    )
    note = (
        "Left of the bars a mark a look: circle good, cross bad, other none. "
        f"Nothing changed {found.unchanged:.1%}, bad before {found.already:.1%}.{rest}"
    )
    alt = f"Bars of the probability of being the culprit. {told}."
    return (plot(name, "Posterior", alt, note, draw, 1.0 + 0.24 * len(window), wide=True),)


def _rates(rates: tuple[float, float]) -> str:
    return f"; a good place looked bad {rates[0]:.0%} of the time, a bad one good {rates[1]:.0%}"


def _short(name: str) -> str:
    """A commit's hash without its tail, anything else as it is."""
    is_hash = len(name) == 40 and all(letter in "0123456789abcdef" for letter in name)
    return name[:SHORT] if is_hash else name
