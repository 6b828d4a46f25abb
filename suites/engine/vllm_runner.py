"""vLLM's own model classes on a CPU: reads cases (JSON), writes a dump (safetensors) for each.

    python vllm_runner.py CASES.json

Runs inside vLLM's environment and imports nothing of draftproof. vLLM reads the config, builds the model, loads the
weights, shares tables, resolves layer ids and computes; in place of what has no CPU kernel without a build stands
plain attention over a causal mask (`Attention`, `LatentAttention`), with the window that vLLM hands to its own.

What its loaders leave unwritten is measured (`loader_ledger.py`), and what vLLM raises is told as a refusal.
"""

import json
import math
import os
import platform
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_NO_USAGE_STATS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import transformers
import vllm
from loader_ledger import Ledger  # lies beside this file, whose folder is the first place that a script imports from
from safetensors.torch import save_file
from vllm.config import get_current_vllm_config, set_current_vllm_config
from vllm.model_executor.layers import attention

FORMAT = "draftproof-dump/1"
METHODS = {"Gemma4AssistantForCausalLM": "mtp", "Gemma4UnifiedAssistantForCausalLM": "mtp"}


class Sight:
    """Which keys a query sees: of the first pass those of columns up to its own, of later passes its own column's."""

    positions = None
    """[T] of the pass that runs"""
    keys = None
    """{layer: keys, values and positions of its passes so far}"""

    @classmethod
    def mask(cls, passes, window):
        """[T, S] over all passes of a layer."""
        column = torch.arange(len(cls.positions))
        seen = [column[None, :] <= column[:, None] if i == 0 else column[None] == column[:, None]
                for i in range(len(passes))]  # fmt: skip
        distance = cls.positions[:, None] - torch.cat([where for _, _, where in passes])[None]
        return torch.cat(seen, 1) & (distance < (window or math.inf))


class Attention(torch.nn.Module):
    """Stands for vLLM's layer of the same name: same arguments, softmax attention without a cache of blocks."""

    def __init__(self, num_heads, head_size, scale, num_kv_heads=None, per_layer_sliding_window=None, prefix="",
                 kv_sharing_target_layer_name=None, **others):  # fmt: skip
        super().__init__()
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.window = num_kv_heads or num_heads, per_layer_sliding_window
        self.layer_name, self.kv_sharing_target_layer_name = prefix, kv_sharing_target_layer_name
        get_current_vllm_config().compilation_config.static_forward_context[prefix] = self

    def process_weights_after_loading(self, dtype):
        """Nothing to pack."""

    def forward(self, query, key, value, output_shape=None):
        """query [T, heads * head_size] -> the same"""
        name = self.kv_sharing_target_layer_name or self.layer_name
        if self.kv_sharing_target_layer_name is None:
            heads = (x.view(len(x), self.num_kv_heads, -1) for x in (key, value))
            Sight.keys.setdefault(name, []).append((*heads, Sight.positions))
        passes = Sight.keys[name]
        keys, values = (torch.cat([one[i] for one in passes]) for i in (0, 1))
        return attend(query.view(len(query), self.num_heads, -1), keys, values, self.scale, self.window, passes)


class LatentAttention(torch.nn.Module):
    """Stands for vLLM's MLAAttention, with keys and values unfolded from the latents."""

    def __init__(self, num_heads, scale, qk_nope_head_dim, qk_rope_head_dim, v_head_dim, q_lora_rank, kv_lora_rank,
                 kv_b_proj, prefix="", **others):  # fmt: skip
        super().__init__()
        self.num_heads, self.scale, self.layer_name = num_heads, scale, prefix
        self.parts, self.kv_b_proj = (qk_nope_head_dim, v_head_dim), kv_b_proj
        self.impl = SimpleNamespace(dcp_world_size=1)

    def process_weights_after_loading(self, dtype):
        """Nothing to pack."""

    def forward(self, q, kv_c_normed, k_pe, output_shape=None, **others):
        """q [T, heads, nope + rope], latents [T, rank], k_pe [T, 1, rope] -> [T, heads * v_head_dim]"""
        unfolded = self.kv_b_proj(kv_c_normed)[0].view(len(q), self.num_heads, -1)
        nope, value = unfolded.split(self.parts, -1)
        key = torch.cat([nope, k_pe.expand(-1, self.num_heads, -1)], -1)
        passes = Sight.keys.setdefault(self.layer_name, [])
        passes.append((key, value, Sight.positions))
        keys, values = (torch.cat([one[i] for one in passes]) for i in (0, 1))
        return attend(q, keys, values, self.scale, None, passes)


def attend(query, keys, values, scale, window, passes):
    """query [T, N, D], keys [S, G, D], values [S, G, D'] -> [T, N * D']"""
    share = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(share, 1) for x in (keys, values))
    scores = torch.einsum("tnd,snd->nts", query, keys) * scale
    scores = scores.masked_fill(~Sight.mask(passes, window), -math.inf)
    return torch.einsum("nts,snd->tnd", scores.softmax(-1), values).flatten(1)


def build(case):
    """vLLM's own configuration of a case."""
    from vllm.engine.arg_utils import EngineArgs

    speculative = None
    if case["draft"]:
        config = json.loads((Path(case["draft"]) / "config.json").read_text())
        method = METHODS.get((config.get("architectures") or [""])[0], "eagle3")
        speculative = {"model": case["draft"], "method": method, "num_speculative_tokens": case["steps"]}
    return EngineArgs(
        model=case["target"], dtype=case["dtype"], enforce_eager=True, skip_tokenizer_init=True,
        speculative_config=speculative, compilation_config={"custom_ops": ["none"], "mode": 0},
    ).create_engine_config()  # fmt: skip


def load(case, config):
    """(target, draft, account of the target's loader, of the draft's)."""
    from vllm.model_executor.model_loader import get_model
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    right, ledgers = DefaultModelLoader.load_weights, (Ledger(), Ledger())

    def get(ledger, make):
        DefaultModelLoader.load_weights = ledger.watch(right)
        # memory that nobody wrote is NaN, not what happened to lie there
        torch.use_deterministic_algorithms(True)
        try:
            return make()
        finally:
            torch.use_deterministic_algorithms(False)
            DefaultModelLoader.load_weights = right

    target = get(ledgers[0], lambda: get_model(vllm_config=config))
    draft = get(ledgers[1], lambda: load_draft(target, config, case["runner"])) if case["draft"] else None
    return target, draft, *ledgers


def load_draft(target, config, runner):
    """The draft, joined to its target by the code of either of vLLM's runners."""
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.worker.gpu.spec_decode.eagle.utils import load_eagle_model

    if runner == "v2":
        draft = load_eagle_model(target, config)
    else:
        draft = get_model(vllm_config=config, model_config=config.speculative_config.draft_model_config)
        held = SimpleNamespace(model=draft, vllm_config=config, use_local_argmax_reduction=False)
        SpecDecodeBaseProposer._maybe_share_embeddings(held, target)
        SpecDecodeBaseProposer._maybe_share_lm_head(held, target)
    if config.speculative_config.method == "mtp":
        from vllm.v1.spec_decode.gemma4 import Gemma4Proposer

        held = SimpleNamespace(speculative_config=config.speculative_config, vllm_config=config, model=draft)
        names = {name for name, layer in target.named_modules() if isinstance(layer, Attention)}
        Gemma4Proposer._setup_gemma4_kv_sharing(held, names)
    return draft


def resolve(target, config):
    """What each of vLLM's two runners would capture, by their own code."""
    from vllm.v1.worker.gpu.spec_decode.eagle.eagle3_utils import get_eagle3_aux_layers_from_config
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    held = SimpleNamespace(speculative_config=config.speculative_config)
    named = {
        "v1": GPUModelRunner._get_eagle3_aux_layers_from_config(held),
        "v2": get_eagle3_aux_layers_from_config(config.speculative_config),
    }
    usual, kept = target.get_eagle3_default_aux_hidden_state_layers(), {}
    for runner, ids in named.items():
        target.set_aux_hidden_state_layers(tuple(ids or usual))
        kept[runner] = list(target.model.aux_hidden_state_layers)
    return kept


def read(target, row, positions, capture, config):
    """The target over one text: (final [T, H], {capture point: [T, H]})."""
    from vllm.forward_context import set_forward_context

    Sight.keys, Sight.positions = {}, positions
    target.set_aux_hidden_state_layers(tuple(capture))
    with set_forward_context(None, config):
        out = target(row, positions, None)
    final, aux = out if isinstance(out, tuple) else (out, [])
    return final, dict(zip(sorted(set(capture)), aux, strict=False))


def steps_of(draft, case, config, row, positions, hidden):
    """Teacher-forced draft steps over one text: (names of the dump -> [T, ..])."""
    from vllm.forward_context import set_forward_context

    found, still = {}, config.speculative_config.method == "mtp"
    for k in range(case["steps"]):
        shifted = torch.cat([row[k + 1 :], row.new_zeros(min(k + 1, len(row)))])
        where = positions if still else positions + k
        Sight.positions = where
        with set_forward_context(None, config):
            state, hidden = draft(input_ids=shifted, positions=where, hidden_states=hidden)
            logits = draft.compute_logits(state)
        ids = vocab_map(draft)
        unknown = (torch.arange(len(row)) + k + 1 >= len(row))[:, None]
        logits = logits if ids is None else logits[:, ids]
        # what an ordered vocabulary does not look at
        logits = logits.masked_fill(logits == torch.finfo(logits.dtype).min, -math.inf)
        found[f"logits.{k + 1}"] = logits.masked_fill(unknown, math.nan)
        found[f"feedback.{k + 1}"] = hidden.masked_fill(unknown, math.nan)
    return found


def vocab_map(draft):
    """[Vd] target ids; None where the draft has the target's vocabulary."""
    offsets = getattr(draft, "draft_id_to_target_id", None)
    return None if offsets is None else torch.arange(len(offsets)) + offsets


def compute(case, config, target, draft, points):
    """The tensors of a dump, all texts of a case."""
    rows = []
    for row in map(torch.tensor, case["tokens"]):
        positions = torch.arange(len(row))
        final, states = read(target, row, positions, case["capture"], config)
        found = {f"hidden.{c}": state for c, state in states.items()}
        found |= {"final": final, "target_logits": target.compute_logits(final)}
        if draft is not None:
            aux = list(read(target, row, positions, points, config)[1].values()) if points else []
            found |= {"aux": torch.stack(aux, 1)} if aux else {}
            hidden = draft.combine_hidden_states(torch.cat(aux, -1)) if points else final
            found |= {"fused": hidden} if points else {}
            found |= steps_of(draft, case, config, row, positions, hidden)
        rows.append(found)
    told = {name: torch.stack([found[name] for found in rows]) for name in rows[0]}
    ids = vocab_map(draft)
    return told if ids is None else {**told, "map": ids}


def run(case):
    """One case: a dump of what was computed, or of what refused it and where."""
    notes, tensors, stage = {}, {}, "config"
    try:
        config = build(case)
        stage = "load"
        # vLLM reads globals of the configuration while it builds and while it runs
        with set_current_vllm_config(config), torch.no_grad():
            target, draft, of_target, of_draft = load(case, config)
            notes["unwritten_target"], notes["unread_target"] = of_target.unwritten, of_target.unread
            points = []
            if draft is not None:
                notes["unwritten"], notes["unread"] = of_draft.unwritten, of_draft.unread
                notes["shared"] = shared(target, draft)
            stage = "run"
            if draft is not None and hasattr(draft, "combine_hidden_states"):
                notes["points"] = resolve(target, config) if getattr(draft.model, "use_aux_hidden_state", True) else {}
                points = notes["points"].get(case["runner"], [])
            tensors = compute(case, config, target, draft, points)
    except Exception as error:  # an engine refuses in any way it likes
        notes["refused"] = {"stage": stage, "reason": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    write(case, notes, tensors)


def shared(target, draft):
    """Tables that vLLM took from the target, as the draft's checkpoint would name them."""
    pairs = (("embed_tokens", target.model, draft.model), ("lm_head", target, draft))
    return [
        name
        for name, theirs, mine in pairs
        if hasattr(mine, name) and getattr(mine, name) is getattr(theirs, name, None)
    ]


def versions():
    return {"vllm": vllm.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version()}  # fmt: skip


def write(case, notes, tensors):
    facts = {name: json.dumps(value) for name, value in notes.items()}
    facts |= {"format": FORMAT, "dtype": case["dtype"], "by": f"vLLM {vllm.__version__}", "name": case["name"]}
    facts["versions"] = json.dumps(versions())
    tensors = {"tokens": torch.tensor(case["tokens"]), **tensors}
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, case["dump"], metadata=facts)


def main(path):
    from vllm.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs

    asked = json.loads(Path(path).read_text())
    torch.set_num_threads(1)
    torch.accelerator.empty_cache = torch.accelerator.synchronize = lambda *args: None
    with tempfile.TemporaryDirectory() as folder:
        first = EngineArgs(model=asked["cases"][0]["target"], skip_tokenizer_init=True).create_engine_config()
        with set_current_vllm_config(first):
            init_distributed_environment(1, 0, f"file://{folder}/rendezvous", 0, "gloo")
            initialize_model_parallel(1, 1)
        for case in asked["cases"]:
            run(case)
            print(case["name"], flush=True)  # noqa: T201


def stand_in():
    """Put our attention where model modules look for vLLM's: those that are imported already, and the package."""
    ours = {"Attention": Attention, "MLAAttention": LatentAttention}
    theirs = {name: getattr(attention, name) for name in ours}
    for module in list(sys.modules.values()):
        for name, layer in ours.items():
            if vars(module).get(name) is theirs[name]:
                setattr(module, name, layer)


stand_in()

if __name__ == "__main__":
    main(sys.argv[1])
