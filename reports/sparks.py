"""Sparklines: the last nights of one number, as small as a word."""

from collections.abc import Sequence
from html import escape

import numpy as np
from markupsafe import Markup

from reports.history import RECENT

WIDTH, HEIGHT, EDGE = 64.0, 16.0, 2.0


def spark(values: Sequence[float], name: str, unit: str = "") -> Markup:
    """A line through the last nights, oldest first; nothing where there are fewer than three."""
    kept = np.asarray([v for v in values if np.isfinite(v)][-RECENT:], float)
    if len(kept) < 3:
        return Markup("")
    low, high = float(kept.min()), float(kept.max())
    across = EDGE + (WIDTH - 2 * EDGE) * np.arange(len(kept)) / (len(kept) - 1)
    up = HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * ((kept - low) / (high - low) if high > low else np.full(len(kept), 0.5))
    points = " ".join(f"{x:.0f},{y:.1f}" for x, y in zip(across, up, strict=True))
    words = f"{name}, {len(kept)} nights: {low:.3g} to {high:.3g}{unit}, last {kept[-1]:.3g}{unit}"
    return Markup(
        f'<svg class="spark" viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img"'
        f' aria-label="{escape(words, quote=True)}">'
        f'<polyline points="{points}"/><circle cx="{across[-1]:.0f}" cy="{up[-1]:.1f}" r="1.8"/></svg>'
    )
