"""Bugs of EAGLE-3 with latent attention: a doubled input, two halves of one product, facts that are the draft's own."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness.planting import Bug
from reference.ops.rope import Rope
from suites.bugs.deepseek import built, unnormed, yarn_power
from suites.bugs.deepseek_twin import latents_by_column, together, unstretched
from suites.bugs.drafts import layer, one_position_back

CLAIMS, TWIN = "suites/correctness/test_eagle3_mla.py", "suites/correctness/test_twin_eagle3_mla.py"
SAYS = f"{CLAIMS}::test_every_draft_step_is_what_transformers_attention_says"
SERVING = f"{CLAIMS}::test_unrolling_is_serving_one_step_at_a_time"
SPELLING = f"{CLAIMS}::test_spelling_and_order_change_no_bit_and_the_ledger_is_whole"
HALVES = f"{CLAIMS}::test_one_half_of_a_latent_alone_is_refused[q_a_proj]"
FOREIGN = f"{CLAIMS}::test_tensors_of_another_form_are_refused_by_name"
PARAMETERS = f"{CLAIMS}::test_every_parameter_changes_the_logits[pinned]"
KEYS = f"{CLAIMS}::test_every_key_changes_the_facts_or_is_inert[rope_interleave]"
REFUSED = f"{CLAIMS}::test_what_has_no_single_reading_is_refused_and_named[experts]"
EPSILON = f"{CLAIMS}::test_the_epsilon_of_the_latents_is_the_drafts_own"
PUBLISHED = f"{CLAIMS}::test_published_drafts_are_read_in_full"
SERVED = f"{TWIN}::test_the_draft_serves_what_the_reference_unrolls"
MANY = f"{TWIN}::test_many_ranks_compute_what_one_computes"
SHARDS = f"{TWIN}::test_a_rank_holds_its_shard_of_every_parameter[2]"
ROWS = f"{TWIN}::test_a_row_has_the_same_bits_alone_and_among_others[torch.float32]"
TABLES = f"{TWIN}::test_a_shared_table_and_head_are_the_targets[optimized]"

PAGE, MLA, DRAFT = "reference.drafts.eagle3_mla", "reference.ops.mla", "reference.drafts.eagle3"
LATENTS, ATEN = "optimized.targets.deepseek", "optimized.ops.aten.Aten"


def told(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[Any], Any]:
    """A reader of configs that changes some facts."""
    return lambda read: lambda *given: (lambda facts: {**facts, **change(facts)})(read(*given))


def halves(kv_first: bool = False, kv_unnormed: bool = False) -> Callable[[Any], Any]:
    """The two products of one input with one mistake."""

    def change(attention: Any) -> None:
        kv_a = attention.kv_a_proj_with_mqa
        if kv_unnormed:
            attention.kv_a_layernorm.register_forward_hook(lambda _, x, y: x[0])
        if kv_first and attention.c.q_rank is not None:
            q_a = attention.q_a_proj

            def both(x: Tensor) -> Tensor:
                return torch.cat([F.linear(x, kv_a.weight, kv_a.bias), F.linear(x, q_a.weight, q_a.bias)], -1)

            q_a.register_forward_hook(lambda _, x, y: both(x[0])[..., : y.shape[-1]])
            kv_a.register_forward_hook(lambda _, x, y: both(x[0])[..., -y.shape[-1] :])

    return built(change)


def by_halves(rotate: Any) -> Any:
    return lambda x, positions, rope, interleaved: rotate(x, positions, rope, not interleaved)


def own_columns(fuse: Any) -> Any:
    """A column-parallel `fc` whose gather was forgotten: other ranks' features are zero."""

    def fused(self: Any, aux: Tensor) -> Tensor:
        whole, group = fuse(self, aux), self.at.group
        run = whole.shape[-1] // group.size
        feature = torch.arange(whole.shape[-1])
        return whole * (feature // run == group.rank) if group.size > 1 else whole

    return fused


def cut_latents(call: Any) -> Any:
    """Each rank keeps its part of a latent, as if it were heads."""

    def part(self: Any, x: Tensor, *place: Any) -> Tensor:
        first, group = self.first_proj, self.first_proj.group
        run = -(-self.c.kv_rank // group.size)
        feature = torch.arange(first.sizes[1])
        mine = (feature // run == group.rank) | (feature >= self.c.kv_rank)
        self.first_proj = lambda rows: (lambda q, kv_a: (q, kv_a * mine))(*first(rows))
        try:
            return call(self, x, *place)
        finally:
            self.first_proj = first

    return part


def bug(name: str, origin: str, at: str, make: Callable[[Any], Any], claim: str = SAYS) -> Bug:
    """A bug of this draft."""
    return Bug(f"mla-draft-{name}", origin, at, make, claim)


READ = f"{PAGE}.read_draft"
BUGS = (
    bug("kv-before-q", "SGLang kimi_k25_eagle3.py:428", f"{MLA}.LatentAttention.__init__", halves(kv_first=True)),
    bug(
        "kv-latent-unnormed",
        "a fused product that norms one of its halves",
        f"{MLA}.LatentAttention.__init__",
        halves(kv_unnormed=True),
    ),
    bug(
        "query-latent-unnormed",
        "a fused product that norms one of its halves",
        f"{MLA}.LatentAttention.query",
        unnormed,
        PARAMETERS,
    ),
    bug("hidden-first", "SGLang list, M13", f"{DRAFT}.Eagle3Layer.forward", layer(swap_halves=True)),
    bug("mscale-once", "ports of DeepSeek", f"{MLA}.Latent.scale", yarn_power(1)),
    bug("mscale-none", "vLLM deepseek_v2.py:1129", f"{MLA}.Latent.scale", yarn_power(0), PUBLISHED),
    bug("rope-by-halves", "vLLM deepseek_v2.py:1126", f"{MLA}.rotate", by_halves),
    bug("rope-of-the-target", "SGLang list, M22", READ, told(lambda f: {"rope": Rope(8, theta=500_000.0)})),
    bug(
        "rope-from-base-10000",
        "TorchSpec deepseek_eagle.py: yarn is given no base",
        READ,
        told(lambda f: {"rope": replace(f["rope"], theta=10_000.0)}),
    ),
    bug("eps-of-the-target", "SGLang list, M21", READ, told(lambda f: {"eps": 1e-5, "latent_norm_eps": 1e-5})),
    bug(
        "latent-eps-fixed", "transformers' DeepseekV3RMSNorm", READ, told(lambda f: {"latent_norm_eps": 1e-6}), EPSILON
    ),
    bug("interleave-unread", "vLLM 1.1", READ, told(lambda f: {"rope_interleaved": True}), KEYS),
    bug("later-step-one-position-back", "vLLM list, 34", f"{DRAFT}.Eagle3Draft.forward", one_position_back, SERVING),
    bug(
        "experts-unread",
        "TorchSpec: one architecture, with experts and without",
        "reference.config.Keys.expect",
        lambda expect: lambda self, key, *allowed: self.get(key) if key == "use_moe" else expect(self, key, *allowed),
        REFUSED,
    ),
    bug(
        "model-prefix-unknown",
        "SGLang kimi_k25_eagle3.py: `model.` is put before every name",
        f"{PAGE}.CHECKPOINT_NAMES[0]",
        lambda _: ("model.model.", ""),
        SPELLING,
    ),
    bug(
        "unpaired-half-dropped",
        "SGLang kimi_k25_eagle3.py:428",
        f"{DRAFT}.Eagle3Facts.optional",
        lambda names: property(lambda self: (*names.fget(self), "layers.0.self_attn.q_a_proj.weight")),
        HALVES,
    ),
    bug(
        "unknown-halves-dropped",
        "SGLang 1.4: names that nobody knows are passed over",
        "harness.checkpoints.NOT_WEIGHTS",
        lambda excuses: (*excuses, ("*_proj*.weight", "unknown")),
        FOREIGN,
    ),
    bug(
        "twin-mscale-none", "a kernel that knows nothing of yarn", f"{LATENTS}.Attention.__init__", unstretched, SERVED
    ),
    bug("twin-keys-by-column", "positions of a call", f"{ATEN}.latent_write", latents_by_column, SERVED),
    bug(
        "twin-fc-not-gathered",
        "SGLang kimi_k25_eagle3.py:212",
        "optimized.drafts.eagle3.Eagle3Draft.fuse",
        own_columns,
        MANY,
    ),
    bug("twin-latents-cut", "latents cut like heads", f"{LATENTS}.Attention.__call__", cut_latents, MANY),
    bug(
        "twin-first-heads-everywhere",
        "kv_b_proj of one rank on all",
        f"{LATENTS}.equal_run",
        lambda run: lambda size, rank, ranks, what: run(size, 0, ranks, what),
        SHARDS,
    ),
    bug("twin-rows-see-each-other", "an attention for one new token", f"{ATEN}.attend_latent", together, ROWS),
    bug(
        "twin-own-table-kept",
        "a draft that ships no table and looks ids up in none",
        "optimized.drafts.eagle3.Eagle3Draft.share_embedding",
        lambda share: lambda self, target: self.disown(self.embed_tokens),
        TABLES,
    ),
)
