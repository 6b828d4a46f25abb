"""Train a draft of the zoo through its reference page, the page that serving is judged by.

The target's states and distributions come from transformers, so a reference page that captures
another layer than it says would show as lost acceptance of this draft. Half of the text is the
corpus, half is what the target itself goes on to say: that is what a draft is asked about.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from harness.checkpoints import save_checkpoint, state_of
from harness.conventions import default_points
from reference.outputs import TargetOutput
from suites.zoo.train_target import Descent, learning_rate_share


@dataclass(frozen=True)
class DraftRecipe:
    """Every number that a draft depends on besides its target and the corpus."""

    way: str
    """a key of `published.WAYS` and of `ways.WAYS`"""
    architecture: dict[str, Any] = field(hash=False)
    """keys of the published config beyond those that its way has in common with its target"""
    steps: int = 1200
    tokens_a_step: int = 2048
    width: int = 128
    """tokens of a window; every eighth step reads windows of `sample_width`"""
    draft_steps: int = 3
    step_decay: float = 0.8
    """loss of draft step k weighs step_decay ** k"""
    samples: int = 1536
    """continuations that the target writes itself, half at temperature 1, half greedy"""
    sample_width: int = 256
    sample_prompt: int = 64
    learning_rate: float = 3e-3
    """of Adam: all parameters, or with `muon_rate` the tables and vectors alone"""
    muon_rate: float | None = 0.02
    warmup: int = 40
    weight_decay: float = 0.05
    seed: int = 0


class Lesson(NamedTuple):
    """What the target knew and said about a batch of text."""

    tokens: Tensor
    """[B, T]"""
    out: TargetOutput
    """aux at the default capture points"""
    probabilities: Tensor
    """[B, T, Vd] the target's, of the tokens that have a draft id"""


@torch.no_grad()
def write_samples(
    target: PreTrainedModel, stream: Tensor, recipe: DraftRecipe, report: Callable[[int], None]
) -> Tensor:
    """Let the target continue windows of the corpus, half at temperature 1, half greedy; a text goes on after token 0.

    stream  [n]
    ->      [samples, T]
    """
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    starts = torch.randint(0, len(stream) - recipe.sample_width, (recipe.samples,), generator=generator)
    written = []
    for index, tokens in enumerate(stream[starts[:, None] + torch.arange(recipe.sample_prompt)].split(128)):
        cache, unread = DynamicCache(config=target.config), tokens
        while tokens.shape[1] < recipe.sample_width:
            logits = target(unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            if index % 2:
                unread = logits.softmax(-1).multinomial(1, generator=generator)
            else:
                unread = logits.argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, unread], 1)
        written.append(tokens)
        report(len(tokens))
    return torch.cat(written)


def choose_draft_vocab(tokens: Tensor, vocab: int, draft_vocab: int) -> Tensor:
    """The target ids seen most often, ascending.

    tokens  [n]
    ->      [Vd]
    """
    return torch.bincount(tokens, minlength=vocab).topk(draft_vocab).indices.sort().values


@torch.no_grad()
def teach(target: PreTrainedModel, tokens: Tensor, ids: Tensor) -> Lesson:
    """One pass of the target.

    tokens  [B, T]
    ids     [Vd]
    """
    with torch.autocast("cpu", torch.bfloat16):
        out = target(tokens, output_hidden_states=True, use_cache=False)
    points = default_points(target.config.num_hidden_layers)
    # transformers' hidden_states[c] is capture point c for every c below the last layer; the last one is normed
    aux = torch.stack([out.hidden_states[point].float() for point in points], 2)
    logits = out.logits.float()
    known = TargetOutput(logits, out.hidden_states[-1].float(), aux)
    return Lesson(tokens, known, logits.softmax(-1)[..., ids])


def step_losses(logits: Tensor, probabilities: Tensor) -> Tensor:
    """Soft cross entropy of every draft step against the target's distribution, averaged over the text.

    logits         [K, B, T, Vd]  column t of step k proposes the token after x_{t+k+1}; later columns have no next token
    probabilities  [B, T, Vd]
    ->             losses [K]
    """
    losses = []
    for k, step in enumerate(logits):
        known = probabilities.shape[1] - k - 1
        log_q = step[:, :known].float().log_softmax(-1)
        losses.append(-(probabilities[:, k + 1 :] * log_q).sum(-1).mean())
    return torch.stack(losses)


def batches(stream: Tensor, samples: Tensor, recipe: DraftRecipe) -> Iterator[Tensor]:
    """Endless batches, half corpus and half samples.

    stream   [n]
    samples  [samples, T]
    ->       batches [B, T]
    """
    generator = torch.Generator().manual_seed(recipe.seed)

    def draw(high: int, count: int) -> Tensor:
        return torch.randint(0, high, (count, 1), generator=generator)

    step = 0
    while True:
        width = recipe.sample_width if step % 8 == 7 else recipe.width
        half, columns = recipe.tokens_a_step // width // 2, torch.arange(width)
        read = stream[draw(len(stream) - width, half) + columns]
        written = samples[draw(len(samples), half), draw(samples.shape[1] - width + 1, half) + columns]
        yield torch.cat([read, written])
        step += 1
