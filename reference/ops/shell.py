"""What a model around a text model has in common with others: the text model, and features among its tokens."""

from typing import Any, NamedTuple

from torch import Tensor, nn

from reference.ops.cache import Cache


class Sensed(NamedTuple):
    """Tokens with features among them."""

    h: Tensor
    """[B, T, H] what layer 0 reads"""
    holes: Tensor
    """[B, T] true where a feature stands"""
    blocks: Tensor | None
    """[B, T] number of a token's image, -1 for none; None where no token sees ahead"""


class Shell(nn.Module):
    """Towers beside a `language_model`, which owns the table, the head and the cache.

    A shell says which ids its tables are asked for (`known`) and what stands among them (`sense`). Neither needs the
    text model: another with the same `embed` may stand in its place.
    """

    language_model: nn.Module

    @property
    def embed_tokens(self) -> nn.Module:
        """The text model's table, which a draft may share."""
        return self.language_model.embed_tokens

    @property
    def lm_head(self) -> nn.Module:
        """The text model's head, which a draft may share."""
        return self.language_model.lm_head

    def tie(self) -> None:
        """A tied head is the embedding's table itself."""
        self.language_model.tie()

    def new_cache(self, batch: int, num_slots: int) -> Cache:
        """Room for `num_slots` tokens of each of `batch` sequences."""
        return self.language_model.new_cache(batch, num_slots)

    def known(self, tokens: Tensor) -> Tensor:
        """The ids that tables are asked for: others than `tokens` where those are placeholders.

        tokens  [B, T]
        ->      [B, T]
        """
        raise NotImplementedError

    def sense(self, h: Tensor, tokens: Tensor, **inputs: Any) -> Sensed:
        """Put what towers make of `inputs` where its placeholders are; errors: ValueError.

        h       [B, T, H]  the embedding of `known(tokens)`
        tokens  [B, T]
        inputs  named as `forward` names them
        """
        raise NotImplementedError

    def embed_inputs(self, tokens: Tensor, **inputs: Any) -> Tensor:
        """What layer 0 reads; errors: ValueError.

        tokens  [B, T]
        inputs  as `forward` takes them
        ->      [B, T, H]
        """
        return self.sense(self.language_model.embed(self.known(tokens)), tokens, **inputs).h

    def place(self, h: Tensor, holes: Tensor, features: Tensor, what: str) -> Tensor:
        """Put features where their placeholders are; errors: ValueError.

        h         [B, T, H]
        holes     [B, T]
        features  [M, H]
        ->        [B, T, H]
        """
        if int(holes.sum()) != len(features):
            raise ValueError(
                f"tokens hold {int(holes.sum())} placeholders of {what}, but features fill {len(features)}"
            )
        return h.index_put((holes,), features.to(h.dtype))
