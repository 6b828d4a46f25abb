"""Changes that are no bugs: a claim that turns red here is too strict, and would cry wolf over somebody's port."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug
from suites.bugs.drafts import GOLDEN
from suites.bugs.loading import WITNESS
from suites.bugs.loop import LAW, sampled
from suites.bugs.ranks import COMPUTE

PAGE, TARGET = "reference.drafts.eagle3", "reference.targets.llama.LlamaTarget"
VERIFY = "reference.ops.sampling.verify_sampled"


def scaled_norm(norm: Any, scale: float, x: Tensor) -> Tensor:
    """A norm of scaled features whose eps is scaled with them."""
    kept, norm.eps = norm.eps, norm.eps * scale**2
    try:
        return norm(x * scale)
    finally:
        norm.eps = kept


def scaled_embedding(right: Any) -> Any:
    """An embedding that goes straight into an RMS norm, scaled: only eps could tell, and it is scaled too."""

    def forward(self: Any, embed: Tensor, *rest: Any) -> Tensor:
        if self.index:
            return right(self, embed, *rest)
        kept, norm = self.input_layernorm.eps, self.input_layernorm
        norm.eps = kept * 16
        try:
            return right(self, embed * 4, *rest)
        finally:
            norm.eps = kept

    return forward


def scaled_states(right: Any) -> Any:
    """Aux states that meet a norm first, halved as half-precision engines scale them."""

    def fuse(self: Any, aux: Tensor) -> Tensor:
        if self.input_norm is not None or self.fc_norm is None:
            return right(self, aux)
        return self.fc(
            torch.cat([scaled_norm(n, 0.5, a) for n, a in zip(self.fc_norm, aux.unbind(2), strict=True)], -1)
        )

    return fuse


def permuted_columns(right: Any) -> Any:
    """Aux states in another order, and the columns of fc with them."""

    def fuse(self: Any, aux: Tensor) -> Tensor:
        if self.fc_norm is not None or self.input_norm is not None:
            return right(self, aux)
        columns = self.fc.weight.unflatten(1, aux.shape[2:]).flip(1).flatten(1)
        return F.linear(aux.flip(2).flatten(2), columns, self.fc.bias)

    return fuse


def wider_padding(_: Any) -> Any:
    """Vocabulary rows padded to 128."""
    return lambda vocab, ranks: -(-vocab // (128 * ranks)) * 128 * ranks


def one_number_a_step(right: Any) -> Any:
    """The recovered token drawn with the same number wherever the first rejection falls: one is ever used."""
    return lambda p, q, drafted, coins, draws: right(p, q, drafted, coins, draws[:, :1].expand_as(draws))


def last_bit(right: Any) -> Any:
    """Logits that differ in their last bit, as another order of a sum leaves them."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = right(self, *args, **kwargs)
        return out._replace(logits=out.logits * (1 + torch.finfo(out.logits.dtype).eps))

    return forward


def change(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(name, origin, at, make, claim, harmless=True)


BUGS = (
    change(
        "embedding scaled before its norm", "vLLM list, E1", f"{PAGE}.Eagle3Layer.forward", scaled_embedding, GOLDEN
    ),
    change("aux states scaled before their norm", "vLLM list, E2", f"{PAGE}.Eagle3Draft.fuse", scaled_states, GOLDEN),
    change("vocabulary padded to 128", "vLLM list, E3", "optimized.parallel.padded_vocab", wider_padding, COMPUTE),
    change("columns of fc with their states", "vLLM list, E4", f"{PAGE}.Eagle3Draft.fuse", permuted_columns, GOLDEN),
    change("accept at equality", "vLLM list, E5", VERIFY, sampled(keep=lambda coins, q, p: coins * q <= p), LAW),
    change("one number a step", "vLLM list, E6", VERIFY, one_number_a_step, LAW),
    change("the last bit of the logits", "vLLM list, E7", f"{TARGET}.forward", last_bit, WITNESS),
)
