"""Train the zoo's EAGLE-3 draft by training-time test: `Eagle3Draft.unroll`, the page that serving is judged by.

The target's states and distributions come from transformers, so a reference page that captures
another layer than it says would show as lost acceptance of this draft. Half of the text is the
corpus, half is what the target itself goes on to say: that is what a draft is asked about.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from harness.checkpoints import save_checkpoint, state_of
from harness.conventions import default_points, spell
from reference.drafts.eagle3 import Eagle3Config, Eagle3Draft
from suites.zoo.train_target import learning_rate_share, parameter_groups

CONVENTION = "after_layer"


@dataclass(frozen=True)
class DraftRecipe:
    """Every number that the draft depends on besides its target and the corpus."""

    draft_vocab: int = 832
    intermediate: int = 512
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    steps: int = 2400
    tokens_a_step: int = 2048
    width: int = 128
    """tokens of a window; every eighth step reads windows of `sample_width`"""
    draft_steps: int = 3
    step_decay: float = 0.8
    """loss of draft step k weighs step_decay ** k"""
    samples: int = 2048
    """continuations that the target writes itself, half at temperature 1, half greedy"""
    sample_width: int = 256
    sample_prompt: int = 64
    learning_rate: float = 3e-3
    warmup: int = 60
    weight_decay: float = 0.05
    seed: int = 0


class Lesson(NamedTuple):
    """What the target knew and said about a batch of text."""

    tokens: Tensor
    """[B, T]"""
    aux: Tensor
    """[B, T, A, H]"""
    probabilities: Tensor
    """[B, T, Vd] the target's, of the tokens that have a draft id"""


def draft_config(target: LlamaForCausalLM, recipe: DraftRecipe) -> dict[str, Any]:
    """The published form; it states its convention, so no engine has to guess."""
    t = target.config
    ids = spell(default_points(t.num_hidden_layers), CONVENTION, t.num_hidden_layers)
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": t.hidden_size,
        "intermediate_size": recipe.intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "head_dim": recipe.head_dim,
        "hidden_act": "silu",
        "vocab_size": t.vocab_size,
        "draft_vocab_size": recipe.draft_vocab,
        "max_position_embeddings": t.max_position_embeddings,
        "rms_norm_eps": t.rms_norm_eps,
        "rope_theta": t.rope_parameters["rope_theta"],
        "attention_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": t.bos_token_id,
        "eos_token_id": t.eos_token_id,
        "torch_dtype": "bfloat16",
        "eagle_config": {
            "layer_ids": CONVENTION,
            "eagle_aux_hidden_state_layer_ids": list(ids),
            "use_aux_hidden_state": True,
        },
    }


@torch.no_grad()
def write_samples(
    target: LlamaForCausalLM, stream: Tensor, recipe: DraftRecipe, report: Callable[[int], None]
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


def new_draft(target: LlamaForCausalLM, ids: Tensor, recipe: DraftRecipe) -> Eagle3Draft:
    """A draft that starts from what it can copy: the target's embedding (kept), its head and final norm.

    ids  [Vd]
    """
    torch.manual_seed(recipe.seed)
    draft = Eagle3Draft(Eagle3Config.from_hf(draft_config(target, recipe)))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.dim() == 2 else torch.nn.init.ones_(parameter)
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(target.model.embed_tokens.weight)
        draft.lm_head.weight.copy_(target.lm_head.weight[ids])
        draft.norm.weight.copy_(target.model.norm.weight)
    draft.embed_tokens.requires_grad_(False)
    draft.d2t.copy_(ids - torch.arange(recipe.draft_vocab))
    draft.t2d.zero_()
    draft.t2d[ids] = True
    return draft


@torch.no_grad()
def teach(target: LlamaForCausalLM, tokens: Tensor, ids: Tensor) -> Lesson:
    """One pass of the target.

    tokens  [B, T]
    ids     [Vd]
    """
    with torch.autocast("cpu", torch.bfloat16):
        out = target(tokens, output_hidden_states=True, use_cache=False)
    points = default_points(target.config.num_hidden_layers)
    # transformers' hidden_states[c] is capture point c for every c below the last layer
    aux = torch.stack([out.hidden_states[point].float() for point in points], 2)
    return Lesson(tokens, aux, out.logits.float().softmax(-1)[..., ids])


def unroll_losses(draft: Eagle3Draft, lesson: Lesson, draft_steps: int) -> Tensor:
    """Soft cross entropy of every draft step against the target's distribution, averaged over the text.

    -> losses [K]
    """
    with torch.autocast("cpu", torch.bfloat16):
        logits = draft.unroll(lesson.tokens, draft.fuse(lesson.aux), draft_steps)
    losses = []
    for k, step in enumerate(logits):
        # column t of step k proposes the token after x_{t+k+1}; later columns have no next token
        known = lesson.tokens.shape[1] - k - 1
        log_q = step[:, :known].float().log_softmax(-1)
        losses.append(-(lesson.probabilities[:, k + 1 :] * log_q).sum(-1).mean())
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


def fit_draft(
    target: LlamaForCausalLM, stream: Tensor, samples: Tensor, recipe: DraftRecipe, report: Callable[[int, float], None]
) -> Eagle3Draft:
    """Train against a frozen target; `report(step, loss)` is called after every step.

    stream   [n]
    samples  [samples, T]
    """
    seen = torch.cat([stream, samples[:, recipe.sample_prompt :].flatten()])
    ids = choose_draft_vocab(seen, target.config.vocab_size, recipe.draft_vocab)
    draft = new_draft(target, ids, recipe)
    weights = recipe.step_decay ** torch.arange(recipe.draft_steps)
    optimizer = torch.optim.AdamW(
        parameter_groups(draft, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True
    )
    source = batches(stream, samples, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe.steps, recipe.warmup)
        losses = unroll_losses(draft, teach(target, next(source), ids), recipe.draft_steps)
        (losses @ weights).backward()
        torch.nn.utils.clip_grad_norm_(draft.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = losses.mean().item()
        if not math.isfinite(mean):
            raise FloatingPointError(f"the draft's loss is {mean} at step {step}")
        report(step, mean)
    return draft.eval()


def save_draft(draft: Eagle3Draft, config: dict[str, Any], folder: Path) -> None:
    """Write config.json and model.safetensors (bf16) as trainers do; the embedding is the target's and left out."""
    tensors = {}
    for name, tensor in state_of(draft).items():
        if name == "embed_tokens.weight":
            continue
        published = "midlayer." + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name
        tensors[published] = (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor).detach()
    save_checkpoint(folder, config, tensors)


@torch.no_grad()
def held_out_losses(target: LlamaForCausalLM, draft: Eagle3Draft, stream: Tensor, recipe: DraftRecipe) -> list[float]:
    """`unroll_losses` over 64 windows spread over held-out text.

    stream  [n]
    """
    starts = torch.linspace(0, len(stream) - recipe.width, 64).long()
    windows = stream[starts[:, None] + torch.arange(recipe.width)]
    ids = torch.arange(recipe.draft_vocab) + draft.d2t
    parts = [unroll_losses(draft, teach(target, part, ids), recipe.draft_steps) for part in windows.split(16)]
    return torch.stack(parts).mean(0).tolist()
