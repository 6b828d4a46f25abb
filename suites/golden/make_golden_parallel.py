"""Make the golden tensors of drafts that propose all tokens at once: D-Flash and P-EAGLE, by the two trainers.

It runs in the environment that `make_golden.py` describes, alone, and imports nothing of the project:

    golden_venv/bin/python suites/golden/make_golden_parallel.py suites/golden/parallel

Each case becomes a folder: `config.json` and `model.safetensors` as that trainer saves them, read back by that trainer,
and `golden.safetensors` with inputs and logits (README.md beside this file states the layout). Both trainers choose at
random which places of a text they train on. Here every place is chosen: speculators' D-Flash is asked for as many
blocks as it finds valid, SpecForge's mask takes the anchors as an argument, and P-EAGLE's sampler is replaced by all
columns.
"""

import argparse
import json
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

# both trainers decorate functions with torch.compile; eager needs no compiler and is the same mathematics
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import specforge.algorithms.common.dflash_family_model as specforge_blocks
import speculators.models.peagle.core as peagle_core
import torch
from safetensors.torch import load_file, save_file
from specforge.modeling.draft.dflash import DFlashDraftModel as SpecforgeDflash
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.losses import resolve_loss_config
from speculators.models.dflash import DFlashDraftModel, DFlashSpeculatorConfig
from speculators.models.eagle3.data import shift_batch
from speculators.models.peagle import PEagleDraftModel, PEagleSpeculatorConfig
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar

BATCH, TOKENS, AUX_STATES, DRAFTS = 2, 8, 2, 3
HIDDEN, VOCAB, DRAFT_VOCAB, MASK = 12, 29, 17, 27
# its default loss is a kernel for GPUs; the logits are caught before any loss
LOSS = resolve_loss_config("kl_div", "eager")
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
MIXED = ["full_attention", "sliding_attention"]


@dataclass(frozen=True)
class Case:
    """One draft: which trainer writes it, what the trainer's own flags are, and what differs in the body."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    family: type[LlamaConfig] | type[Qwen3Config] = Qwen3Config

    @property
    def implementation(self) -> str:
        return self.name.split("_")[0]

    @property
    def kind(self) -> str:
        return "_".join(self.name.split("_")[:2])


CASES = (
    Case("specforge_dflash_plain", body={"head_dim": 8, "num_hidden_layers": 1}),
    # the window is narrower than the text: SpecForge measures it from each query
    Case(
        "specforge_dflash_sliding",
        body={"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 4, "attention_bias": True},
    ),
    Case("speculators_dflash_plain", {"draft_vocab_size": DRAFT_VOCAB}),
    # wider than the text: what it trains inside the block; how it measures the context is its own
    Case(
        "speculators_dflash_causal",
        {"draft_vocab_size": VOCAB, "sliding_window_non_causal": False},
        {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 64},
    ),
    Case(
        "speculators_dflash_non_causal",
        {"draft_vocab_size": DRAFT_VOCAB, "sliding_window_non_causal": True},
        {"layer_types": MIXED, "use_sliding_window": True, "sliding_window": 64, "num_key_value_heads": 4},
    ),
    Case("speculators_peagle_plain", family=LlamaConfig),
    Case("speculators_peagle_norms", {"norm_before_residual": True, "norm_before_fc": True}, {"num_hidden_layers": 1}),
    Case("speculators_peagle_fc_norm", {"fc_norm": True}, {"num_hidden_layers": 1}, LlamaConfig),
)


def draw_weights(model: nn.Module, seed: torch.Generator) -> None:
    """Norms around one, not at one, and in no order: a skipped or swapped norm shows."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=seed)
            if name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif name == "mask_hidden":
                weight.copy_(noise)
            elif weight.ndim == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=seed))
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    if getattr(model, "d2t", None) is not None:
        ids = torch.randperm(VOCAB, generator=seed)[: model.d2t.shape[0]].sort().values
        model.d2t.copy_(ids - torch.arange(len(ids)))
        model.t2d.zero_()[ids] = True


def draw_inputs(seed: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> tokens [B, T], aux [B, T, A, H]; states grow with depth, as a target's do."""
    tokens = torch.randint(VOCAB, (BATCH, TOKENS), generator=seed)
    aux = torch.randn(BATCH, TOKENS, AUX_STATES, HIDDEN, generator=seed)
    return tokens, aux * torch.tensor([0.5, 2.0])[:, None]


def save_specforge_dflash(case: Case, folder: Path, seed: torch.Generator) -> dict[str, Tensor]:
    """Write the folder as the trainer does; returns what that format leaves to the target."""
    block = {"mask_token_id": MASK, "target_layer_ids": [1, 4]}
    config = Qwen3Config(**{**BODY, **case.body}, num_target_layers=7, block_size=DRAFTS + 1, dflash_config=block)
    model = SpecforgeDflash(config)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    names = ("embed_tokens.weight", "lm_head.weight")
    return {name: torch.randn(VOCAB, HIDDEN, generator=seed) / HIDDEN**0.5 for name in names}


def run_specforge_dflash(folder: Path, tokens: Tensor, aux: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """The trainer's own mask and forward over a block after every column.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      [B, T, K, V]  the block at anchor p in column p
    """
    config = Qwen3Config.from_pretrained(folder)
    config._attn_implementation = "eager"
    model = SpecforgeDflash(config).eval()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    width, anchors = DRAFTS + 1, torch.arange(TOKENS).expand(BATCH, -1)
    asked = torch.full((BATCH, TOKENS, width), model.mask_token_id)
    asked[..., 0] = tokens
    given = {"S": TOKENS, "block_size": width, "device": tokens.device}
    kept = torch.ones_like(anchors, dtype=torch.bool)
    full = specforge_blocks.create_dflash_sdpa_mask(anchors, kept, **given)
    masks = {"full_attention": full}
    if model.sliding_window is not None:
        sliding = specforge_blocks.create_dflash_sdpa_mask(anchors, kept, sliding_window=model.sliding_window, **given)
        masks["sliding_attention"] = sliding
    place = (anchors[..., None] + torch.arange(width)).flatten(1)
    embeds = nn.functional.embedding(asked.flatten(1), shared["embed_tokens.weight"])
    out = model(torch.cat([anchors, place], 1), masks, embeds, aux.flatten(2))
    logits = out @ shared["lm_head.weight"].T
    return logits.unflatten(1, (TOKENS, width))[:, :, 1:]


def speculators_config(case: Case, algorithm: str) -> dict[str, Any]:
    body = case.family(**{**BODY, **case.body})
    body._attn_implementation = "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=DRAFTS)
    verifier = VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"])
    return {
        "transformer_layer_config": body,
        "mask_token_id": MASK,
        "speculators_config": SpeculatorsConfig(
            algorithm=algorithm, proposal_methods=[proposal], default_proposal_method="greedy", verifier=verifier
        ),
        **case.flags,
    }


def save_speculators_dflash(case: Case, folder: Path, seed: torch.Generator) -> dict[str, Tensor]:
    """Write the folder with speculators' `save_pretrained`, which leaves out what is the target's."""
    given = speculators_config(case, "dflash")
    model = DFlashDraftModel(DFlashSpeculatorConfig(block_size=DRAFTS + 1, aux_hidden_state_layer_ids=[2, 5], **given))
    draw_weights(model, seed)
    model.save_pretrained(folder)
    names = ["embed_tokens.weight"] + (["lm_head.weight"] if case.flags["draft_vocab_size"] == VOCAB else [])
    return {name: dict(model.named_parameters())[name].detach().clone() for name in names}


def run_speculators(model: nn.Module, folder: Path, shared: dict[str, Tensor]) -> list[Tensor]:
    """Load the saved tensors; what the head gives is caught."""
    # its from_pretrained insists on a target to fetch; these two are the trainer's copies of the target's own
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors") | shared, strict=False)
    if set(missing) - {"verifier_norm.weight", "verifier_lm_head.weight"} or unexpected:
        raise RuntimeError(f"{folder}: missing {missing}, unexpected {unexpected}")
    caught: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: caught.append(out))
    return caught


def run_speculators_dflash(folder: Path, tokens: Tensor, aux: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """The trainer's own forward, one sequence a call: a block at every anchor that it finds valid.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      [B, T, K, Vd]  NaN at the anchors that it leaves out, the last ones
    """
    config = DFlashSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = DFlashDraftModel(config).eval()
    caught, count = run_speculators(model, folder, shared), TOKENS - (DRAFTS + 1)
    for row in range(BATCH):
        ids = tokens[row][None]
        states, last = aux[row].flatten(1)[None], torch.zeros(1, TOKENS, HIDDEN)
        model(states, ids, torch.ones(1, TOKENS), last, torch.zeros_like(ids), max_anchors=count, loss_config=LOSS)
    blocks = torch.cat(caught).unflatten(1, (count, DRAFTS + 1))[:, :, 1:]
    return torch.cat([blocks, blocks.new_full((BATCH, TOKENS - count, *blocks.shape[2:]), float("nan"))], 1)


def save_speculators_peagle(case: Case, folder: Path, seed: torch.Generator) -> dict[str, Tensor]:
    """Write the folder with speculators' `save_pretrained`; its format holds the embedding."""
    given = speculators_config(case, "peagle")
    model = PEagleDraftModel(
        PEagleSpeculatorConfig(draft_vocab_size=DRAFT_VOCAB, eagle_aux_hidden_state_layer_ids=[2, 5], **given)
    )
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return {}


def run_speculators_peagle(folder: Path, tokens: Tensor, aux: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """The trainer's own forward, one sequence a call, with every column at every depth.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      [B, T, K, Vd]  the run whose root is x_p in column p; NaN where x_{p+k-1} is not known
    """
    config = PEagleSpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = PEagleDraftModel(config).eval()
    caught = run_speculators(model, folder, shared)
    pairs = [(column, depth) for depth in range(DRAFTS) for column in range(TOKENS - 1 - depth)]
    column, depth = torch.tensor(pairs).unbind(1)
    peagle_core.generate_cod_sample_indices = lambda **_: (column, depth)
    logits = torch.full((BATCH, TOKENS, DRAFTS, DRAFT_VOCAB), float("nan"))
    for row in range(BATCH):
        batch = shift_batch(
            {
                "input_ids": tokens[row],
                "hidden_states": aux[row].flatten(1),
                "verifier_last_hidden_states": torch.zeros(TOKENS, HIDDEN),
                "loss_mask": torch.ones(TOKENS),
                "lengths": torch.tensor([TOKENS]),
                "position_ids": torch.arange(TOKENS),
            }
        )
        states, ids, last = (batch[key][None] for key in ("hidden_states", "input_ids", "verifier_last_hidden_states"))
        model(states, ids, torch.zeros_like(ids), verifier_last_hidden_states=last, loss_config=LOSS)
        # column t of the shifted text reads x_{t+1}, its root
        logits[row, column + 1, depth] = caught[row][0]
    return logits


SAVE = {
    "specforge_dflash": save_specforge_dflash,
    "speculators_dflash": save_speculators_dflash,
    "speculators_peagle": save_speculators_peagle,
}
RUN = {
    "specforge_dflash": run_specforge_dflash,
    "speculators_dflash": run_speculators_dflash,
    "speculators_peagle": run_speculators_peagle,
}


def describe(case: Case, seed: int) -> dict[str, str]:
    """What the header of `golden.safetensors` says."""
    return {
        "implementation": case.implementation,
        "version": version(case.implementation),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "flags": json.dumps(dict(case.flags), sort_keys=True),
        "body": json.dumps({"model_type": case.family.model_type, **case.body}, sort_keys=True),
        "seed": str(seed),
    }


@torch.no_grad()
def make(case: Case, folder: Path) -> None:
    """Write one golden folder."""
    number = zlib.crc32(case.name.encode())
    seed = torch.Generator().manual_seed(number)
    shared = SAVE[case.kind](case, folder, seed)
    tokens, aux = draw_inputs(seed)
    logits = RUN[case.kind](folder, tokens, aux, shared)
    golden = {"tokens": tokens, "aux": aux, "logits": logits.contiguous(), **shared}
    save_file(golden, folder / "golden.safetensors", metadata=describe(case, number))


def place(made: Path, folder: Path) -> None:
    """Replace a golden folder by the one just made: its three files and nothing else."""
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors", "golden.safetensors"):
        (made / name).chmod(0o644)
        (made / name).replace(folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the golden folders.")
    parser.add_argument("out", type=Path, help="the folder that holds the golden folders")
    parser.add_argument("names", nargs="*", help="cases to make; all when absent")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    disable_progress_bar()
    chosen.out.mkdir(exist_ok=True)
    for case in CASES:
        if not chosen.names or case.name in chosen.names:
            with tempfile.TemporaryDirectory(dir=chosen.out) as scratch:
                make(case, Path(scratch))
                place(Path(scratch), chosen.out / case.name)


if __name__ == "__main__":
    main()
