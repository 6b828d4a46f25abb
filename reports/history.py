"""Records over time: one value a night and series, and where the level moved.

A night is a run. Its value is the median over its processes' medians, or the acceptance length over its prompts; the
same units as a comparison has. Change points are drawn for people who look for slow drift; no gate reads them.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from reports.noise import Array
from reports.sides import ACCEPTANCE, medians
from reports.statistics import complete_steps
from reports.store import Frames

SERIES = ["pair", "case", "metric"]
RECENT = 30
"""nights of a sparkline, and of the level that the last night is held against"""
SHORTEST = 5
"""nights a level lasts at least"""
PENALTY = 6.0
"""of a further level, in variances of a night times the log of the number of nights"""


def nights(frames: Frames, pair: str = "", metric: str = "") -> pd.DataFrame:
    """One row a night and series, oldest first: pair, case, metric, unit, better, run, started, value, units."""
    parts = [_timed(frames["sample"], pair, metric), _answered(frames["accept"], pair, metric)]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    started = dict(zip(frames["run"]["run"], frames["run"]["started"], strict=True))
    table["started"] = [started.get(run) or "" for run in table["run"]]
    # a run id begins with its time, so it orders runs that say no start
    return table.sort_values([*SERIES, "run"], kind="stable").reset_index(drop=True)


def summary(table: pd.DataFrame, points: bool = False) -> pd.DataFrame:
    """One row a series: how many nights, the last value, and how it stands to the level of the nights before."""
    rows = []
    for (pair, case, metric), group in table.groupby(SERIES, sort=True):
        values = group["value"].to_numpy(float)
        level = float(np.median(values[-RECENT - 1 : -1])) if len(values) > 1 else float("nan")
        row = {
            "pair": pair, "metric": metric, "case": case, "unit": group["unit"].iloc[0],
            "better": group["better"].iloc[0], "nights": len(values), "last": values[-1], "level": level,
            "change": values[-1] / level - 1 if level else float("nan"), "last_night": group["run"].iloc[-1],
            "recent": tuple(values[-RECENT:].tolist()),
        }  # fmt: skip
        if points:
            row["moved"] = tuple(group["run"].iloc[i] for i in change_points(values))
        rows.append(row)
    return pd.DataFrame(rows)


def change_points(values: Sequence[float] | Array) -> list[int]:
    """First nights of a new level; needs ruptures (pip install draftproof[history]).

    Kernel change points (Arlot et al. 2019) with a linear kernel: levels of equal spread, which is that between
    neighbouring nights, so that a drift does not count as noise.
    """
    from ruptures import KernelCPD

    series = np.asarray(values, float)
    if len(series) < 2 * SHORTEST:
        return []
    scaled = np.log(series) if series.min() > 0 else series
    spread = 1.4826 * float(np.median(np.abs(np.diff(scaled)))) / np.sqrt(2)
    if spread == 0:
        spread = float(np.diff(scaled).std()) / np.sqrt(2) or 1.0
    search = KernelCPD(kernel="linear", min_size=SHORTEST).fit((scaled / spread)[:, None])
    return [int(end) for end in search.predict(pen=PENALTY * np.log(len(series)))[:-1]]


def _timed(table: pd.DataFrame, pair: str, metric: str) -> pd.DataFrame:
    """Process medians, then their median."""
    kept = _chosen(table, pair, metric)
    names = [*SERIES, "run", "process"]
    values = kept["values"]
    if kept.duplicated(names).any():
        # several visits of one process are one pool of values
        grouped = kept.groupby(names, sort=False)
        values = grouped["values"].sum()
        kept = grouped.first().reset_index()
    middles = kept.assign(value=medians(values.tolist()))
    grouped = middles.groupby([*SERIES, "run"], sort=False)
    found = grouped.agg(unit=("unit", "first"), better=("better", "first"), value=("value", "median"),
                        units=("value", "size"))  # fmt: skip
    return found.reset_index()


def _answered(table: pd.DataFrame, pair: str, metric: str) -> pd.DataFrame:
    """Acceptance lengths over whole verify steps."""
    kept = table[table["num_draft_tokens"].astype(bool)]
    kept = kept.assign(metric=(ACCEPTANCE + " " + kept["dataset"].astype(str)).str.strip())
    kept = _chosen(kept, pair, metric)
    whole = [complete_steps(a, bool(cut)) for a, cut in zip(kept["accepted"], kept["truncated"], strict=True)]
    counted = kept.assign(kept=[sum(steps) for steps in whole], steps=[len(steps) for steps in whole])
    found = counted.groupby([*SERIES, "run"], sort=False).agg(
        kept=("kept", "sum"), steps=("steps", "sum"), units=("prompt", "nunique")
    )
    found = found[found["steps"] > 0].reset_index()
    values = 1 + found["kept"].astype(float) / found["steps"].astype(float)
    return found.assign(unit="tokens a step", better="up", value=values).drop(columns=["kept", "steps"])


def _chosen(table: pd.DataFrame, pair: str, metric: str) -> pd.DataFrame:
    kept = table[table["pair"] == pair] if pair else table
    return kept[kept["metric"] == metric] if metric else kept
