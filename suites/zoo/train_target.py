"""Train a target of the zoo over the corpus and save it as a published checkpoint is.

transformers' own classes are trained here, so the weights were never touched by the reference
pages that will be judged on them.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from suites.zoo.corpus import END
from suites.zoo.muon import Muon

BALANCE_RATE = 1e-3
"""step of a router's correction bias towards experts that got less than their share, DeepSeek-V3's rule"""

LOOP_TEXTS, LOOP_PROMPT, LOOP_LENGTH, LOOP_BATCH = 128, 64, 72, 16
"""of a round of `unlearn_loops`: texts, tokens given, tokens said, texts a step"""


@dataclass(frozen=True)
class TargetRecipe:
    """Every number that a target depends on besides the corpus."""

    model_type: str
    architecture: dict[str, Any] = field(hash=False)
    """keys of the published config; what every target of the zoo shares is filled in"""
    vocab: int = 1024
    positions: int = 512
    steps: int = 1400
    tokens_a_step: int = 2048
    learning_rate: float = 3e-3
    """of Adam: all parameters, or with `muon_rate` the tables and vectors alone"""
    muon_rate: float | None = 0.02
    """of Muon, for the matrices between the tables; None trains everything with Adam"""
    warmup: int = 40
    weight_decay: float = 0.1
    loop_rounds: int = 3
    """of `unlearn_loops`, after the steps"""
    loop_weight: float = 2.0
    loop_share: float = 0.1
    """of the learning rates, in `unlearn_loops`"""
    seed: int = 0

    def config(self) -> PreTrainedConfig:
        """The published form of the architecture."""
        shared = {
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": None,
        }
        return AutoConfig.for_model(self.model_type, **{**shared, **self.architecture})


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then linear to zero."""
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def windows(stream: Tensor, recipe: TargetRecipe) -> Iterator[Tensor]:
    """Endless batches of windows; seven steps of eight see 256 positions, the eighth all of them.

    stream  [n]
    ->      batches [B, T + 1]
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    step = 0
    while True:
        width = recipe.positions if step % 8 == 7 else min(256, recipe.positions)
        starts = torch.randint(0, len(stream) - width, (recipe.tokens_a_step // width,), generator=generator)
        yield stream[starts[:, None] + torch.arange(width + 1)]
        step += 1


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices, none on norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def is_matrix(p: Tensor) -> bool:
    """Whether there are rows and columns; a mask's state [1, 1, X] is a vector."""
    return p.dim() > 1 and min(p.shape[-2:]) > 1


class Descent:
    """The optimizers of one model on one schedule."""

    def __init__(self, model: nn.Module, rates: tuple[float, float | None], weight_decay: float) -> None:
        """rates: Adam's, and Muon's for the matrices that are no table, head or router (None: Adam has them all)."""
        adam_rate, muon_rate = rates
        self.model = model
        tables = ("embed", "lm_head", "gate.weight")
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inner = [p for name, p in trained if is_matrix(p) and not any(table in name for table in tables)]
        self.optimizers: list[torch.optim.Optimizer] = []
        if muon_rate is None:
            groups = parameter_groups(model, weight_decay)
        else:
            self.optimizers.append(Muon(inner, muon_rate, decay=weight_decay))
            chosen = {id(p) for p in inner}
            rest = [p for _, p in trained if id(p) not in chosen]
            groups = [{"params": rest, "weight_decay": 0.0}]
        self.optimizers.append(torch.optim.AdamW(groups, lr=adam_rate, betas=(0.9, 0.95), fused=True))
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def step(self, loss: Tensor, share: float) -> None:
        """One step down at `share` of the learning rates."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rates in zip(self.optimizers, self.rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad()


class Balance:
    """Moves the correction bias of every router that has one, by how many tokens its experts got in a step."""

    def __init__(self, model: nn.Module) -> None:
        self.loads: dict[nn.Module, Tensor] = {}
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self.count)

    def count(self, router: nn.Module, _: Sequence[Any], out: Sequence[Tensor]) -> None:
        self.loads[router] = torch.bincount(out[-1].flatten(), minlength=router.e_score_correction_bias.numel()).float()

    def step(self) -> None:
        """Experts below the mean load become likelier."""
        for router, load in self.loads.items():
            router.e_score_correction_bias += BALANCE_RATE * (load.mean() - load).sign()


def fit_target(stream: Tensor, recipe: TargetRecipe, report: Callable[[int, float], None]) -> PreTrainedModel:
    """Train from scratch; `report(step, loss)` is called after every step.

    stream  [n]
    """
    torch.manual_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config())
    descent = Descent(model, (recipe.learning_rate, recipe.muon_rate), recipe.weight_decay)
    balance, batches = Balance(model), windows(stream, recipe)
    for step in range(recipe.steps):
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        descent.step(loss, learning_rate_share(step, recipe.steps, recipe.warmup))
        balance.step()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the target's loss is {loss.item()} at step {step}")
        report(step, loss.item())
    return model.eval()


@torch.no_grad()
def say_on(model: PreTrainedModel, tokens: Tensor, length: int) -> Tensor:
    """Greedy continuations.

    tokens  [B, T]
    ->      [B, T + length]
    """
    cache, unread = DynamicCache(config=model.config), tokens
    for _ in range(length):
        unread = (
            model(unread, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)[:, None]
        )
        tokens = torch.cat([tokens, unread], 1)
    return tokens


def closes_repeat(text: Tensor, size: int = 4) -> Tensor:
    """Whether the `size`-gram that ends here stood earlier in the same text.

    text  [B, T]
    ->    [B, T]
    """
    grams = text.unfold(1, size, 1)  # [B, T - size + 1, size]
    same = (grams[:, :, None] == grams[:, None]).all(-1)
    return F.pad(same.tril(-1).any(-1), (size - 1, 0))


def unlearn_loops(
    model: PreTrainedModel, stream: Tensor, recipe: TargetRecipe, report: Callable[[int, float], None]
) -> None:
    """Make tokens unlikely that close a repeated 4-gram in what the model says greedily; `report(round, share)`.

    A small target loops when it decodes greedily, and loops are easy to draft. Sequence-level unlikelihood training
    beside ordinary steps on the corpus: Welleck et al., arXiv 1908.04319.

    stream  [n]
    """
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    descent = Descent(model, (recipe.learning_rate, recipe.muon_rate), 0.0)
    batches = windows(stream, recipe)
    columns, steps, step = torch.arange(LOOP_PROMPT), recipe.loop_rounds * (LOOP_TEXTS // LOOP_BATCH), 0
    for number in range(recipe.loop_rounds):
        starts = torch.randint(0, len(stream) - LOOP_PROMPT, (LOOP_TEXTS, 1), generator=generator)
        texts = say_on(model.eval(), stream[starts + columns], LOOP_LENGTH)
        closing = closes_repeat(texts[:, LOOP_PROMPT:])
        report(number, closing[:, 3:].float().mean().item())
        for text, wrong in zip(texts.split(LOOP_BATCH), closing.split(LOOP_BATCH), strict=True):
            batch = next(batches)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model.train()(batch[:, :-1], use_cache=False).logits
                said = model(text[:, :-1], use_cache=False).logits[:, LOOP_PROMPT - 1 :]
            loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
            p = said.float().softmax(-1).gather(-1, text[:, LOOP_PROMPT:, None])[..., 0]
            unlikely = -((1 - p).clamp_min(1e-4).log() * wrong).mean()
            descent.step(loss + recipe.loop_weight * unlikely, recipe.loop_share * learning_rate_share(step, steps, 4))
            step += 1
    model.eval()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, stream: Tensor, width: int = 256) -> float:
    """Cross entropy per token over whole windows of held-out text.

    stream  [n]
    """
    count = (len(stream) - 1) // width
    inputs, labels = (stream[shift : shift + count * width].view(count, width) for shift in (0, 1))
    losses = [
        F.cross_entropy(model(x, use_cache=False).logits.flatten(0, 1), y.flatten(), reduction="none")
        for x, y in zip(inputs.split(16), labels.split(16), strict=True)
    ]
    return torch.cat(losses).mean().item()


def save_target(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json, generation_config.json."""
    model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            # as published: its steps are finer than bfloat16
            module.e_score_correction_bias = module.e_score_correction_bias.float()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
