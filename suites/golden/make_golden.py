"""Make the golden tensors: EAGLE-3 drafts and their logits, written by SpecForge 0.2.0 and speculators 0.9.0.

Neither trainer is a dependency of draftproof, and their requirements contradict ours, so this script runs alone in an
environment of its own and imports nothing of the project:

    python3.11 -m venv golden_venv
    golden_venv/bin/pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu
    golden_venv/bin/pip install transformers==5.17.0
    golden_venv/bin/pip install --no-deps speculators==0.9.0 specforge==0.2.0
    golden_venv/bin/pip install loguru openai pydantic-settings psutil tqdm datasets==5.2.0 hs_connectors
    golden_venv/bin/python suites/golden/make_golden.py suites/golden

Each case becomes a folder: `config.json` and `model.safetensors` as that trainer saves them, read back by that trainer,
and `golden.safetensors` with inputs and logits (README.md beside this file states the layout). Weights and inputs are
drawn from the crc32 of the case's name. The order of tokens and states is the trainers' own: SpecForge's `padding`,
speculators' `shift_batch`.
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

# both trainers decorate small functions with torch.compile; eager needs no compiler and is the same mathematics
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import torch
from safetensors.torch import load_file, save_file
from specforge.export.checkpoint_io import apply_legacy_rope_scaling
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.utils import padding
from speculators import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.eagle3.data import shift_batch
from speculators.proposals.greedy import GreedyTokenProposalConfig
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen3Config
from transformers.utils.logging import disable_progress_bar

BATCH, TOKENS, AUX_STATES, STEPS = 2, 11, 3, 3
HIDDEN, VOCAB, DRAFT_VOCAB = 32, 101, 31
BODY = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 36,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One draft: which trainer writes it, the trainer's own flags, and what differs in the body."""

    name: str
    flags: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)
    family: type[LlamaConfig] | type[Qwen3Config] = LlamaConfig

    @property
    def implementation(self) -> str:
        return self.name.split("_")[0]

    @property
    def aux_width(self) -> int:
        return self.flags.get("target_hidden_size", HIDDEN)


CASES = (
    # the older format has neither key: no fc_norm, the final norm before the head
    Case("specforge_plain"),
    Case("specforge_fc_norm", {"fc_norm": True, "norm_output": True}),
    Case("specforge_no_head_norm", {"fc_norm": False, "norm_output": False}),
    Case("specforge_fc_norm_no_head_norm", {"fc_norm": True, "norm_output": False}),
    Case("specforge_wide_target_llama3", {"target_hidden_size": 48}, {"head_dim": 16, "rope_parameters": LLAMA3}),
    Case("speculators_plain"),
    Case("speculators_norm_before_residual", {"norm_before_residual": True}),
    Case("speculators_norm_before_fc", {"norm_before_fc": True}),
    Case("speculators_fc_norm", {"fc_norm": True}),
    Case("speculators_norm_output", {"norm_output": True}),
    # what its command line trains when nothing is said
    Case(
        "speculators_train_default",
        {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True},
    ),
    Case("speculators_fc_norm_norm_output", {"fc_norm": True, "norm_output": True}),
    Case("speculators_llama3", body={"rope_parameters": LLAMA3}),
    Case("speculators_head_dim_bias", body={"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    Case("speculators_qwen3_yarn", {"norm_before_residual": True}, {"rope_parameters": YARN}, Qwen3Config),
    Case("speculators_two_layers", {"norm_output": True}, {"num_hidden_layers": 2}),
)


def draw_weights(model: nn.Module, seed: torch.Generator) -> None:
    """Norms around one, not at one, and in no order: a skipped or swapped norm shows."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=seed)
            if name.endswith("bias"):
                weight.copy_(0.3 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.5 + torch.rand(weight.shape, generator=seed))
            elif "embed" in name:
                weight.copy_(0.02 * noise)  # as small as trained ones: eps shows
            else:
                weight.copy_(noise / weight.shape[1] ** 0.5)
    ids = torch.randperm(VOCAB, generator=seed)[:DRAFT_VOCAB].sort().values
    model.d2t.copy_(ids - torch.arange(DRAFT_VOCAB))
    model.t2d.zero_()[ids] = True


def draw_inputs(aux_width: int, seed: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> tokens [B, T], aux [B, T, A, X]; states grow with depth, as a target's do."""
    tokens = torch.randint(VOCAB, (BATCH, TOKENS), generator=seed)
    aux = torch.randn(BATCH, TOKENS, AUX_STATES, aux_width, generator=seed)
    return tokens, aux * torch.tensor([0.5, 1.0, 2.0])[:, None]


def save_specforge(case: Case, folder: Path, seed: torch.Generator) -> dict[str, Tensor]:
    """Write the folder as `specforge export` does; returns what that format leaves to the target."""
    config = LlamaConfig(**{**BODY, **case.body}, draft_vocab_size=DRAFT_VOCAB, **case.flags)
    model = LlamaForCausalLMEagle3(config)
    draw_weights(model, seed)
    kept = {name: tensor for name, tensor in model.state_dict().items() if "embed" not in name}
    model.save_pretrained(folder, state_dict=kept)
    apply_legacy_rope_scaling(str(folder))
    return {"embed_tokens.weight": model.embed_tokens.weight.detach().clone()}


def run_specforge(folder: Path, tokens: Tensor, aux: Tensor, shared: dict[str, Tensor]) -> list[Tensor]:
    """The trainer's loop over `backbone`.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      STEPS times [B, T, Vd]
    """
    model = LlamaForCausalLMEagle3(LlamaConfig.from_pretrained(folder)).eval()
    model.load_state_dict(load_file(folder / "model.safetensors") | shared, strict=True)
    hidden = model.project_hidden_states(aux.flatten(2))
    known = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    mask = model.prepare_decoder_attention_mask(known, hidden, BATCH, TOKENS, 0)
    positions = torch.arange(TOKENS)[None]
    cache: list[list[Tensor]] = [[], []]
    steps = []
    for _ in range(STEPS):
        tokens = padding(tokens, left=False)
        hidden = model.backbone(model.embed_input_ids(tokens), hidden, cache, mask, positions)
        steps.append(model.compute_logits(hidden))
    return steps


def save_speculators(case: Case, folder: Path, seed: torch.Generator) -> dict[str, Tensor]:
    """Write the folder with speculators' `save_pretrained`; its format holds the embedding."""
    body = case.family(**{**BODY, **case.body})
    body._attn_implementation = "eager"
    proposal = GreedyTokenProposalConfig(speculative_tokens=STEPS)
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=body,
        draft_vocab_size=DRAFT_VOCAB,
        eagle_aux_hidden_state_layer_ids=[2, 4, 5],
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[proposal],
            default_proposal_method="greedy",
            verifier=VerifierConfig(name_or_path=None, architectures=["LlamaForCausalLM"]),
        ),
        **case.flags,
    )
    model = Eagle3DraftModel(config)
    draw_weights(model, seed)
    model.save_pretrained(folder)
    return {}


def run_speculators(folder: Path, tokens: Tensor, aux: Tensor, shared: dict[str, Tensor]) -> list[Tensor]:
    """The trainer's own forward, one sequence a call, its logits caught at the head.

    tokens  [B, T]
    aux     [B, T, A, X]
    ->      STEPS times [B, T - 1, Vd]
    """
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    model = Eagle3DraftModel(config).eval()
    # its from_pretrained insists on a target to fetch; these two are the trainer's copies of the target's own
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors") | shared, strict=False)
    if set(missing) - {"verifier_norm.weight", "verifier_lm_head.weight"} or unexpected:
        raise RuntimeError(f"{folder}: missing {missing}, unexpected {unexpected}")
    caught: list[Tensor] = []
    model.lm_head.register_forward_hook(lambda _module, _args, out: caught.append(out))
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
        states, ids, positions = (batch[key][None] for key in ("hidden_states", "input_ids", "position_ids"))
        model(states, ids, torch.zeros_like(ids), position_ids=positions, ttt_steps=STEPS)
    return [torch.cat(caught[step::STEPS]) for step in range(STEPS)]


SAVE = {"specforge": save_specforge, "speculators": save_speculators}
RUN = {"specforge": run_specforge, "speculators": run_speculators}


def align(steps: list[Tensor]) -> Tensor:
    """Column t of draft step k holds the proposal after x_{t+k}; NaN where a trainer was fed padding.

    ->  [K, B, T, Vd]
    """
    logits = torch.full((STEPS, BATCH, TOKENS, DRAFT_VOCAB), float("nan"))
    for k, step in enumerate(steps, 1):
        logits[k - 1, :, : TOKENS - k] = step[:, : TOKENS - k]
    return logits


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
    folder.mkdir(parents=True, exist_ok=True)
    shared = SAVE[case.implementation](case, folder, seed)
    tokens, aux = draw_inputs(case.aux_width, seed)
    logits = align(RUN[case.implementation](folder, tokens, aux, shared))
    for k in range(1, STEPS + 1):
        if not logits[k - 1, :, : TOKENS - k].isfinite().all():
            raise RuntimeError(f"{case.name}: draft step {k} is not finite")
    golden = {"tokens": tokens, "aux": aux, "logits": logits, **shared}
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
    for case in CASES:
        if not chosen.names or case.name in chosen.names:
            with tempfile.TemporaryDirectory(dir=chosen.out) as scratch:
                make(case, Path(scratch))
                place(Path(scratch), chosen.out / case.name)


if __name__ == "__main__":
    main()
