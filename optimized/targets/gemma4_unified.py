"""Gemma 4 Unified, fast from layer 0 on: the equations of `reference/targets/gemma4_unified.py`.

(1) to (4), what embeds patches and sound, are the reference's; (5) is `Gemma4Shell.known` and `Shell.sense`; (6) is
what `attend` does of `ends` on sliding layers. The layers: `optimized/targets/gemma4.py`.
"""

from optimized.targets.gemma4_shell import Gemma4Shell


class Gemma4UnifiedTarget(Gemma4Shell):
    """One rank's share of the whole target."""
