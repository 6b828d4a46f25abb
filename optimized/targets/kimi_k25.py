"""Kimi K2.5, fast from layer 0 on: the equations of `reference/targets/kimi_k25.py`.

(1), the tower and its projector, are the reference's; (2) is `Shell.sense`. Images are read like text, causally.
The layers: `optimized/targets/deepseek.py`.
"""

from torch import Tensor

from optimized.shell import Shell
from optimized.targets.deepseek import DeepseekTarget


class KimiK25Target(Shell):
    """One rank's share of the whole target."""

    text = DeepseekTarget

    def known(self, tokens: Tensor) -> Tensor:
        """A placeholder's id may lie beyond the vocabulary: tokens [B, T] -> [B, T]"""
        return tokens.masked_fill((tokens == self.c.image_token) | (tokens == self.c.video_token), 0)
