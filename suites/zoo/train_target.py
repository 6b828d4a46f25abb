"""Train the zoo's target: a small Llama over the corpus, saved as a published checkpoint is.

transformers' own LlamaForCausalLM is trained here, so the weights were never touched by the
reference page that will be judged on them.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from suites.zoo.corpus import END


@dataclass(frozen=True)
class TargetRecipe:
    """Every number that the target depends on besides the corpus."""

    vocab: int = 1024
    hidden: int = 192
    intermediate: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    positions: int = 512
    steps: int = 1400
    tokens_a_step: int = 4096
    learning_rate: float = 4e-3
    warmup: int = 60
    weight_decay: float = 0.1
    seed: int = 0

    def config(self) -> LlamaConfig:
        """The published form of the architecture."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=self.positions,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=None,
        )


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


def parameter_groups(model: torch.nn.Module, weight_decay: float) -> list[dict]:
    """Weight decay on matrices, none on norms."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def fit_target(stream: Tensor, recipe: TargetRecipe, report: Callable[[int, float], None]) -> LlamaForCausalLM:
    """Train from scratch; `report(step, loss)` is called after every step.

    stream  [n]
    """
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(recipe.config())
    optimizer = torch.optim.AdamW(
        parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True
    )
    batches = windows(stream, recipe)
    for step in range(recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * learning_rate_share(step, recipe.steps, recipe.warmup)
        batch = next(batches)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the target's loss is {loss.item()} at step {step}")
        report(step, loss.item())
    return model.eval()


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, stream: Tensor, width: int = 256) -> float:
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


def save_target(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write config.json, model.safetensors (bf16), tokenizer.json, tokenizer_config.json, generation_config.json."""
    model.to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
