"""Gemma 4 with its towers, fast from layer 0 on: the equations of `reference/targets/gemma4_mm.py`.

(1) and (2), the towers and their projectors, are the reference's; (3) is `Gemma4Shell.known`; (4) and (5) are
`Shell.sense`; (6) is what `attend` does of `ends` on sliding layers. The layers: `optimized/targets/gemma4.py`.
"""

from optimized.targets.gemma4_shell import Gemma4Shell


class Gemma4MmTarget(Gemma4Shell):
    """One rank's share of the whole target."""
