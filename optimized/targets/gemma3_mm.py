"""Gemma 3 with images, fast from layer 0 on: the equations of `reference/targets/gemma3_mm.py`.

(1) to (4), the tower and its projector, are the reference's; (5) is `Shell.sense`; (6) is what `attend` does of `ends`
on every layer, sliding ones within their window. The layers: `optimized/targets/gemma3.py`.
"""

from torch import Tensor

from optimized.shell import Shell
from optimized.targets.gemma3 import Gemma3Target


class Gemma3MmTarget(Shell):
    """One rank's share of the whole target."""

    text = Gemma3Target

    def known(self, tokens: Tensor) -> Tensor:
        """The placeholder's id may lie beyond the vocabulary: tokens [B, T] -> [B, T]"""
        beyond = self.c.image_token >= self.c.vocab
        return tokens.masked_fill(tokens == self.c.image_token, 0) if beyond else tokens
