"""Train a draft of the zoo through its reference page, the page that serving is judged by.

The target's states and distributions come from transformers, so a reference page that captures
another layer than it says would show as lost acceptance of this draft. Half of the text is the
corpus, half is what the target itself goes on to say: that is what a draft is asked about.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from harness.checkpoints import save_checkpoint, state_of
from harness.conventions import default_points
from reference.outputs import TargetOutput
from suites.zoo.published import WAYS
from suites.zoo.train_target import Descent, learning_rate_share


@dataclass(frozen=True)
class DraftRecipe:
    """Every number that a draft depends on besides its target and the corpus."""

    way: str
    """a key of `published.WAYS`"""
    architecture: dict[str, Any] = field(hash=False)
    """keys of the published config beyond those that its way has in common with its target"""
    draft_vocab: int | None = None
    """tokens that can be proposed, those seen most often; all when None"""
    steps: int = 600
    tokens_a_step: int = 2048
    width: int = 128
    """tokens of a window; every eighth step reads windows of `sample_width`"""
    draft_steps: int = 3
    step_decay: float = 0.8
    """loss of draft step k weighs step_decay ** k"""
    samples: int = 1024
    """continuations that the target writes itself, half at temperature 1, half greedy"""
    sample_width: int = 256
    sample_prompt: int = 64
    learning_rate: float = 3e-3
    """of Adam: all parameters, or with `muon_rate` the tables and vectors alone"""
    muon_rate: float | None = 0.02
    warmup: int = 40
    weight_decay: float = 0.05
    bfloat16: bool = True
    """matrix products of training in bfloat16; experts of the reference pages take one dtype throughout"""
    hidden_dropout: float = 0.0
    """share of columns whose hidden state is left out in training, so that keys must tell what it usually does"""
    seed: int = 0


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


def new_draft(target: PreTrainedModel, config: dict[str, Any], recipe: DraftRecipe, ids: Tensor) -> Any:
    """A draft that starts from what it can copy: the target's table (kept), its head and its final norm.

    ids  [Vd]
    """
    torch.manual_seed(recipe.seed)
    way = WAYS[recipe.way]
    facts = way.read_config(config)
    draft = way.build(facts)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() > 1 else torch.nn.init.ones_(parameter)
    given = {"embed_tokens.weight": target.get_input_embeddings().weight, "lm_head.weight": target.lm_head.weight[ids]}
    given["norm.weight"] = target.model.norm.weight + ("gemma3" in target.config.model_type)
    own = dict(draft.named_parameters())
    with torch.no_grad():
        for name, value in given.items():
            if name in own and own[name].shape == value.shape:
                own[name].copy_(value)
        if "d2t" in dict(draft.named_buffers()):
            draft.d2t.copy_(ids - torch.arange(len(ids)))
            draft.t2d[ids] = True
    for name in optional(facts):
        own[name].requires_grad_(False)
    return draft


def optional(facts: Any) -> tuple[str, ...]:
    """The weights that a file leaves to the target, and training too."""
    return tuple(name for name in getattr(facts, "optional", ()) if name.endswith(".weight"))


def own_parameters(draft: Any) -> dict[str, Tensor]:
    """The parameters that a file of this draft holds."""
    return {name: p for name, p in draft.named_parameters() if name not in optional(draft.c)}


class Teacher:
    """A frozen target, and the draft that asks it."""

    def __init__(
        self, target: PreTrainedModel, draft: Any, ids: Tensor, bfloat16: bool = True, page: Any = None
    ) -> None:
        """page: the target's reference module, for a draft that reads keys; transformers keeps no such cache."""
        self.target, self.draft, self.ids, self.page = target, draft, ids, page
        self.bfloat16 = bfloat16
        self.hidden_dropout = 0.0
        if page is not None:
            draft.join(page)

    @torch.no_grad()
    def teach(self, tokens: Tensor) -> tuple[TargetOutput, Tensor]:
        """One pass of the target: tokens [B, T] -> what it knew, its distribution over draft ids [B, T, Vd]"""
        with torch.autocast("cpu", torch.bfloat16):
            out = self.target(tokens, output_hidden_states=True, use_cache=False)
        points = default_points(self.target.config.num_hidden_layers)
        # transformers' hidden_states[c] is capture point c for every c below the last layer; the last one is normed
        aux = torch.stack([out.hidden_states[point].float() for point in points], 2)
        logits = out.logits.float()
        return TargetOutput(logits, out.hidden_states[-1].float(), aux), logits.softmax(-1)[..., self.ids]

    def losses(self, tokens: Tensor, num_steps: int) -> Tensor:
        """Soft cross entropy of every draft step against the target's distribution, averaged over the text.

        tokens  [B, T]
        ->      [K]
        """
        out, probabilities = self.teach(tokens)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            if hasattr(self.draft, "blocks"):
                return self._blocks(tokens, out, probabilities, num_steps)
            keys = {} if self.page is None else {"cache": self._keys(tokens)}
            hidden = self.draft.read(out)
            if self.hidden_dropout:
                hidden = hidden * (torch.rand(*tokens.shape, 1) >= self.hidden_dropout)
            logits = self.draft.unroll(tokens, hidden, num_steps, **keys)
        # column t of step k proposes the token after x_{t+k+1}; later columns have no next token
        width = tokens.shape[1]
        return torch.stack(
            [cross_entropy(step[:, : width - k - 1], probabilities[:, k + 1 :]) for k, step in enumerate(logits)]
        )

    def _blocks(self, tokens: Tensor, out: TargetOutput, probabilities: Tensor, num_steps: int) -> Tensor:
        """Blocks at random anchors: every column would cost K + 1 times as much and teach little more."""
        batch, width = tokens.shape
        anchors = 1 + torch.rand(batch, width - num_steps).topk(width // 2, -1).indices.sort(-1).values
        logits = self.draft.blocks(tokens, self.draft.read(out), anchors, num_steps)  # [B, X, K, Vd]
        rows = torch.arange(batch)[:, None]
        return torch.stack([cross_entropy(logits[:, :, k], probabilities[rows, anchors + k]) for k in range(num_steps)])

    def _keys(self, tokens: Tensor) -> Any:
        """The cache of the target's page after it read `tokens`."""
        cache = self.page.new_cache(*tokens.shape)
        with torch.no_grad():
            self.page(tokens, cache=cache)
        return cache


def cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """logits [B, T, Vd], probabilities [B, T, Vd] -> their mean cross entropy"""
    return -(probabilities * logits.float().log_softmax(-1)).sum(-1).mean()


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


def fit_draft(
    teacher: Teacher, stream: Tensor, samples: Tensor, recipe: DraftRecipe, report: Callable[[int, float], None]
) -> None:
    """Train the teacher's draft; `report(step, loss)` is called after every step.

    stream   [n]
    samples  [samples, T]
    """
    torch.manual_seed(recipe.seed)
    weights = recipe.step_decay ** torch.arange(recipe.draft_steps)
    descent = Descent(teacher.draft, (recipe.learning_rate, recipe.muon_rate), recipe.weight_decay)
    source = batches(stream, samples, recipe)
    teacher.hidden_dropout = recipe.hidden_dropout
    for step in range(recipe.steps):
        losses = teacher.losses(next(source), recipe.draft_steps)
        descent.step(losses @ weights, learning_rate_share(step, recipe.steps, recipe.warmup))
        mean = losses.mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the draft's loss is {mean} at step {step}")
        report(step, mean)
    teacher.hidden_dropout = 0.0
    teacher.draft.eval()


def save_draft(draft: Any, config: dict[str, Any], recipe: DraftRecipe, folder: Path) -> None:
    """Write config.json and model.safetensors (bf16) as trainers do; what the file may leave to the target is left."""
    tensors = {}
    for name, tensor in state_of(draft).items():
        is_map = name in ("d2t", "t2d")
        if name in optional(draft.c) or (is_map and recipe.draft_vocab is None):
            continue
        published = WAYS[recipe.way].spell(name)
        tensors[published] = (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).detach()
    save_checkpoint(folder, config, tensors)


@torch.no_grad()
def held_out_losses(teacher: Teacher, stream: Tensor, recipe: DraftRecipe) -> list[float]:
    """`Teacher.losses` over 64 windows spread over held-out text.

    stream  [n]
    """
    torch.manual_seed(recipe.seed)
    starts = torch.linspace(0, len(stream) - recipe.width, 64).long()
    windows = stream[starts[:, None] + torch.arange(recipe.width)]
    parts = [teacher.losses(part, recipe.draft_steps) for part in windows.split(16)]
    return torch.stack(parts).mean(0).tolist()
