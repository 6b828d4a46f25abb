"""Facts that norms and activations of one name differ in, stated instead of guessed."""

import functools
from dataclasses import dataclass

import torch

ACTIVATIONS = ("silu", "gelu_tanh")
ROUTERS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class NormKind:
    """When an RMS norm rounds and what it multiplies by; u = x / sqrt(mean(x^2) + eps) in float32.

    cast_first      y = w * round(u); otherwise y = round(w * u), the product in float32
    plus_one        the factor is 1 + w, in float32
    """

    cast_first: bool
    plus_one: bool = False


LLAMA = NormKind(cast_first=True)
GEMMA3 = NormKind(cast_first=False, plus_one=True)
GEMMA4 = NormKind(cast_first=False)


def one_of(value: str, known: tuple[str, ...], what: str) -> str:
    """The value; ValueError where it is not known."""
    if value not in known:
        raise ValueError(f"{what} {value!r} is not one of {', '.join(known)}")
    return value


def choosable(num_experts: int, groups: int, top_groups: int, num_chosen: int) -> int:
    """Experts a group; ValueError where so many experts cannot be chosen from so many groups."""
    size = num_experts // groups
    if size * groups != num_experts or not 0 < top_groups <= groups or not 0 < num_chosen <= top_groups * size:
        raise ValueError(
            f"{num_chosen} of {num_experts} experts cannot be chosen from {top_groups} of {groups} equal groups"
        )
    return size


@functools.cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """The number as a tensor of this dtype would hold it; reads nothing from any device."""
    return torch.tensor(number, dtype=torch.float64, device="cpu").to(dtype).double().tolist()
