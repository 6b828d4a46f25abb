"""What the shells around the text twin of Gemma 4 have in common: `reference/targets/gemma4_shell.py`, fast."""

from torch import Tensor

from optimized.shell import Shell
from optimized.targets.gemma4 import Gemma4Target


class Gemma4Shell(Shell):
    """Features among the tokens of gemma4.py."""

    text = Gemma4Target

    def known(self, tokens: Tensor) -> Tensor:
        """Padding where a token is a placeholder; the tables of gemma4.py (2) are asked so, too.

        tokens  [B, T]
        ->      [B, T]
        """
        c = self.c
        holes = (tokens == c.image_token) | (tokens == c.video_token) | (tokens == c.audio_token)
        return tokens.masked_fill(holes, c.padding_token)
