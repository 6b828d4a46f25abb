"""Train the zoo: one target, one EAGLE-3 draft, the text held out from both. `draftproof zoo train` calls `train`.

About ten minutes on two CPU cores. Everything that decides the weights is a field of a recipe or is
recorded beside them in training.json: seeds, the corpus' sha256, versions, threads, the loss curves.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import LlamaForCausalLM

from suites.zoo.cards import draft_card, target_card
from suites.zoo.corpus import Source, encode, fingerprint, read_sources, train_tokenizer
from suites.zoo.held_out import cut, write_jsonl
from suites.zoo.measure import measure
from suites.zoo.train_draft import DraftRecipe, draft_config, fit_draft, held_out_losses, save_draft, write_samples
from suites.zoo.train_target import TargetRecipe, fit_target, held_out_loss, save_target

TARGET, DRAFT = "llama", "llama-eagle3"
NUM_PROMPTS, NUM_SEQUENCES = 80, 288
CURVE_EVERY = 25
"""steps averaged into one point of a recorded loss curve"""


class Curve:
    """A loss curve, averaged over CURVE_EVERY steps, that moves a progress bar."""

    def __init__(self, progress: Progress, label: str, steps: int) -> None:
        self.progress, self.label = progress, label
        self.task = progress.add_task(label, total=steps)
        self.losses: list[float] = []
        self.started = time.monotonic()

    def __call__(self, step: int, loss: float) -> None:
        self.losses.append(loss)
        recent = self.losses[-CURVE_EVERY:]
        self.progress.update(self.task, advance=1, description=f"{self.label}  loss {sum(recent) / len(recent):.3f}")

    def points(self) -> list[float]:
        """Means of consecutive runs of CURVE_EVERY steps."""
        runs = [self.losses[i : i + CURVE_EVERY] for i in range(0, len(self.losses), CURVE_EVERY)]
        return [round(sum(run) / len(run), 4) for run in runs]

    def record(self) -> dict[str, Any]:
        """What training.json keeps of it."""
        return {
            "steps_a_point": CURVE_EVERY,
            "loss_curve": self.points(),
            "seconds": round(time.monotonic() - self.started, 1),
        }


def versions() -> dict[str, Any]:
    """What trained it."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


def corpus_record(sources: list[Source]) -> dict[str, Any]:
    """Which text was read and which of it was kept apart."""
    return {
        "text": f"standard library of CPython {platform.python_version()}",
        "license": "PSF-2.0",
        "sha256": fingerprint(sources),
        "files": len(sources),
        "characters": sum(len(source.text) for source in sources),
        "held_out": [source.path for source in sources if source.held_out],
    }


def train(
    out: Path,
    target_recipe: TargetRecipe | None = None,
    draft_recipe: DraftRecipe | None = None,
    console: Console | None = None,
    parts: tuple[str, ...] = ("target", "draft"),
) -> dict[str, Any]:
    """Train the pair into `out`/llama and `out`/llama-eagle3, and cut prompts.jsonl and heldout.jsonl.

    parts   what to train; ("draft",) reads the target that `out` already holds
    ->      what training.json of both parts says
    """
    target_recipe, draft_recipe = target_recipe or TargetRecipe(), draft_recipe or DraftRecipe()
    out = Path(out)
    transformers.utils.logging.disable_progress_bar()
    sources = read_sources()
    shared = {"versions": versions(), "corpus": corpus_record(sources)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True)) as progress:
        records = {}
        if "target" in parts:
            records["target"] = train_target(out, sources, target_recipe, shared, progress)
        if "draft" in parts:
            records["draft"] = train_draft(out, sources, draft_recipe, shared, progress)
    return records


def train_target(
    out: Path, sources: list[Source], recipe: TargetRecipe, shared: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """Tokenizer, target, held-out text; everything that depends on no draft."""
    folder = out / TARGET
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(sources, recipe.vocab)
    trained = encode(tokenizer, [source for source in sources if not source.held_out])
    held_out = encode(tokenizer, [source for source in sources if source.held_out])
    prompts, sequences = cut(tokenizer, sources, NUM_PROMPTS, NUM_SEQUENCES, recipe.seed)
    write_jsonl(prompts, out / "prompts.jsonl")
    write_jsonl(sequences, out / "heldout.jsonl")

    curve = Curve(progress, "target", recipe.steps)
    model = fit_target(trained, recipe, curve)
    save_target(model, tokenizer, folder)
    saved = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    record = {
        **shared,
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in saved.parameters()),
        "tokens": {"trained_on": len(trained), "held_out": len(held_out)},
        **curve.record(),
        "held_out_loss": round(held_out_loss(saved, held_out), 4),
    }
    write_record(folder, record, target_card)
    return record


def train_draft(
    out: Path, sources: list[Source], recipe: DraftRecipe, shared: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """The draft of the target that `out` holds, as rounded to bf16 and saved."""
    target = LlamaForCausalLM.from_pretrained(out / TARGET, dtype=torch.float32).eval().requires_grad_(False)
    tokenizer = tokenizers.Tokenizer.from_file(str(out / TARGET / "tokenizer.json"))
    trained = encode(tokenizer, [source for source in sources if not source.held_out])
    held_out = encode(tokenizer, [source for source in sources if source.held_out])

    task = progress.add_task("target writes", total=recipe.samples)
    samples = write_samples(target, trained, recipe, lambda count: progress.advance(task, count))
    curve = Curve(progress, "draft", recipe.steps)
    draft = fit_draft(target, trained, samples, recipe, curve)
    save_draft(draft, draft_config(target, recipe), out / DRAFT)
    own = [p for name, p in draft.named_parameters() if name != "embed_tokens.weight"]
    record = {
        **shared,
        "recipe": dataclasses.asdict(recipe),
        "parameters": sum(p.numel() for p in own),
        **curve.record(),
        "held_out_losses": [round(loss, 4) for loss in held_out_losses(target, draft, held_out, recipe)],
    }
    record["measured"] = measure(out)
    write_record(out / DRAFT, record, draft_card)
    return record


def write_record(folder: Path, record: dict[str, Any], card: Callable[[dict[str, Any]], str]) -> None:
    """training.json and the model card made from it."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(record), encoding="utf-8")
