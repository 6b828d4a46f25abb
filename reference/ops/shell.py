"""What a model around a text model passes on to it."""

from torch import nn

from reference.ops.cache import Cache


class Shell(nn.Module):
    """Towers beside a `language_model`, which owns the table, the head and the cache."""

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
