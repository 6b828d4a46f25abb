"""Train the zoo: every target, every draft, the text held out from both. `draftproof zoo train` calls `train`.

Ten to twenty minutes a checkpoint on one CPU core. Everything that decides the weights is a field of a recipe
(`entries.py`) or is recorded beside them in training.json: seeds, the corpus' sha256, versions, threads, loss curves.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from suites.catalog import open_target
from suites.zoo.cards import draft_card, target_card
from suites.zoo.corpus import Source, encode, fingerprint, read_sources, train_tokenizer
from suites.zoo.entries import DRAFTS, TARGETS, target_of
from suites.zoo.held_out import cut, write_jsonl
from suites.zoo.measure import measure
from suites.zoo.published import draft_config
from suites.zoo.train_draft import (
    DraftRecipe,
    Teacher,
    choose_draft_vocab,
    fit_draft,
    held_out_losses,
    new_draft,
    own_parameters,
    save_draft,
    write_samples,
)
from suites.zoo.train_target import TargetRecipe, fit_target, held_out_loss, save_target, unlearn_loops

FIRST = "llama"
"""the target whose folder holds the tokenizer that all share"""
NUM_PROMPTS, NUM_SEQUENCES = 80, 600
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
    names: Sequence[str] = (),
    recipes: dict[str, TargetRecipe | DraftRecipe] | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train checkpoints into `out`/NAME: targets first, drafts after the targets that `out` then holds.

    names    keys of `entries.TARGETS` and `entries.DRAFTS`; all when empty
    recipes  other recipes than those of the entries, by name
    ->       what training.json of each says
    """
    wanted, out = list(names) or [*TARGETS, *DRAFTS], Path(out)
    known: dict[str, TargetRecipe | DraftRecipe] = {**TARGETS, **DRAFTS, **(recipes or {})}
    transformers.utils.logging.disable_progress_bar()
    sources = read_sources()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True)) as progress:
        shop = Workshop(out, sources, progress)
        records = {}
        for name in sorted(wanted, key=lambda name: name in DRAFTS):
            recipe = known[name]
            records[name] = shop.target(name, recipe) if isinstance(recipe, TargetRecipe) else shop.draft(name, recipe)
    return records


class Workshop:
    """What all checkpoints of one run are made from."""

    def __init__(self, out: Path, sources: list[Source], progress: Progress) -> None:
        self.out, self.sources, self.progress = out, sources, progress
        self.shared = {"versions": versions(), "corpus": corpus_record(sources)}

    def target(self, name: str, recipe: TargetRecipe) -> dict[str, Any]:
        """A target and its tokenizer; with the first, the tokenizer itself and the held-out text."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.tokenizer(recipe) if name == FIRST else self.read_tokenizer()
        trained, held_out = self.text(tokenizer)
        curve = Curve(self.progress, name, recipe.steps)
        model, shares = fit_target(trained, recipe, curve), Curve(self.progress, f"{name}, loops", recipe.loop_rounds)
        unlearn_loops(model, trained, recipe, shares)
        save_target(model, tokenizer, folder)
        saved = self.read_target(name)
        record = {
            **self.shared,
            "recipe": dataclasses.asdict(recipe),
            "parameters": sum(p.numel() for p in saved.parameters()),
            "tokens": {"trained_on": len(trained), "held_out": len(held_out)},
            **curve.record(),
            "loop_shares": [round(share, 4) for share in shares.losses],
            "held_out_loss": round(held_out_loss(saved, held_out), 4),
        }
        write_record(folder, record, target_card)
        return record

    def draft(self, name: str, recipe: DraftRecipe) -> dict[str, Any]:
        """A draft of a target that `out` holds, as rounded to bf16 and saved."""
        of = target_of(name)
        target, vocab = self.read_target(of).requires_grad_(False), recipe.draft_vocab
        trained, held_out = self.text(self.read_tokenizer())
        task = self.progress.add_task(f"{of} writes", total=recipe.samples)
        samples = write_samples(target, trained, recipe, lambda count: self.progress.advance(task, count))
        seen = torch.cat([trained, samples[:, recipe.sample_prompt :].flatten()])
        ids = choose_draft_vocab(seen, target.config.vocab_size, vocab or target.config.vocab_size)
        mask = int(torch.bincount(seen, minlength=target.config.vocab_size).argmin())
        config = draft_config(recipe.way, target.config, recipe.architecture, mask)
        draft = new_draft(target, config, recipe, ids)
        page = open_target(self.out / of).module if hasattr(draft, "target") else None
        teacher = Teacher(target, draft, ids, recipe.bfloat16, page)
        curve = Curve(self.progress, name, recipe.steps)
        fit_draft(teacher, trained, samples, recipe, curve)
        save_draft(draft, config, recipe, self.out / name)
        record = {
            **self.shared,
            "recipe": dataclasses.asdict(recipe),
            "parameters": sum(p.numel() for p in own_parameters(draft).values()),
            **curve.record(),
            "held_out_losses": [round(loss, 4) for loss in held_out_losses(teacher, held_out, recipe)],
        }
        record["measured"] = measure(self.out, name)
        write_record(self.out / name, record, draft_card)
        return record

    def tokenizer(self, recipe: TargetRecipe) -> tokenizers.Tokenizer:
        """The tokenizer of the zoo, and the text held out from everything, in its tokens."""
        tokenizer = train_tokenizer(self.sources, recipe.vocab)
        prompts, sequences = cut(tokenizer, self.sources, NUM_PROMPTS, NUM_SEQUENCES, recipe.seed)
        write_jsonl(prompts, self.out / "prompts.jsonl")
        write_jsonl(sequences, self.out / "heldout.jsonl")
        return tokenizer

    def read_tokenizer(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_file(str(self.out / FIRST / "tokenizer.json"))

    def read_target(self, name: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.out / name, dtype=torch.float32).eval()

    def text(self, tokenizer: tokenizers.Tokenizer) -> tuple[Tensor, Tensor]:
        """Trained and held-out streams: [n], [m]"""
        kept = [source for source in self.sources if not source.held_out]
        return encode(tokenizer, kept), encode(tokenizer, [source for source in self.sources if source.held_out])


def write_record(folder: Path, record: dict[str, Any], card: Callable[[str, dict[str, Any]], str]) -> None:
    """training.json and the model card made from it."""
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(card(folder.name, record), encoding="utf-8")
