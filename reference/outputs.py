"""What every target and every draft gives back: always the same type, whatever was asked."""

from typing import NamedTuple

from torch import Tensor


class TargetOutput(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    hidden: Tensor
    """[B, T, H] after the final norm"""
    aux: Tensor
    """[B, T, A, H] the residual stream at the capture points, in the order asked; A = 0 when nothing is asked"""


class DraftOutput(NamedTuple):
    logits: Tensor
    """[B, T, Vd]"""
    feedback: Tensor
    """[B, T, H] what the next draft step reads as `hidden`"""
