"""Bugs of next-token modules: their names, the config they share, which layer is asked, and what it reads."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from harness.planting import Bug
from reference.drafting import Step
from reference.outputs import DraftOutput

WITNESS, CLAIMS = "suites/correctness/test_witness_mtp.py", "suites/correctness/test_mtp.py"
SPECULATORS = f"{WITNESS}::test_the_module_of_qwen3_moe_is_that_of_speculators[normed]"
TRANSFORMERS = f"{WITNESS}::test_the_module_of_deepseek_is_that_of_transformers"
ACCOUNT = f"{CLAIMS}::test_target_and_module_account_for_every_tensor_of_one_folder"
COPIES = f"{CLAIMS}::test_copies_of_the_tables_are_read_and_compared"
SERVED = f"{CLAIMS}::test_pinned_modules_serve_as_they_unroll[13]"
REFUSED = f"{CLAIMS}::test_a_name_that_nobody_reads_is_refused_by_name"
ACCEPTED = (
    "suites/correctness/test_twin_mtp.py::test_a_module_leaves_the_text_alone_and_both_sides_accept_alike"
    "[two layers-batch 3]"
)

QWEN, DEEPSEEK = "reference.drafts.qwen3_moe_mtp", "reference.drafts.deepseek_nextn"
SHARED, TWIN = "reference.drafts.next_token", "optimized.drafts.next_token"


def mixed(swap_halves: bool = False, one_norm: bool = False) -> Callable[[Any], Any]:
    """Equation (2) of Qwen3-MoE's module with one thing wrong."""

    def mix(self: Any, embed: Tensor, hidden: Tensor, *place: Any) -> Tensor:
        positions, visible, cache, slots, layer = place
        of_hidden = self.pre_fc_norm_hidden
        halves = [(of_hidden if one_norm else self.pre_fc_norm_embedding)(embed), of_hidden(hidden)]
        u = self.fc(torch.cat(halves[::-1] if swap_halves else halves, -1))
        return self.norm(self.layers[layer](u, positions, visible, layer, cache, slots))

    return lambda right: mix


def feed_back_unnormed(forward: Any) -> Any:
    """The next step reads what the final norm read."""

    def step(self: Any, *args: Any, **facts: Any) -> DraftOutput:
        read: list[Tensor] = []
        hook = self.norm.register_forward_pre_hook(lambda _, given: read.append(given[0]))
        out = forward(self, *args, **facts)
        hook.remove()
        return DraftOutput(out.logits, read[0])

    return step


def norm_twice(forward: Any) -> Any:
    """The head norms what was normed."""

    def step(self: Any, *args: Any, **facts: Any) -> DraftOutput:
        out = forward(self, *args, **facts)
        return DraftOutput(self.lm_head(self.norm(out.feedback)), out.feedback)

    return step


def renamed_everywhere(rename: Any) -> Any:
    """The module's prefix taken out wherever it stands."""

    def changed(name: str, table: Any) -> str:
        module = ("mtp.", "") in tuple(table) and name.startswith("mtp.")
        return name.replace("mtp.", "") if module else rename(name, table)

    return changed


def one_layer_for_all(read: Any) -> Any:
    def from_hf(cls: Any, config: dict[str, Any], **facts: Any) -> Any:
        found = read(cls, config, **facts)
        config["num_hidden_layers"] = 1
        return found

    return from_hf


def without_base(build: Any) -> Any:
    def init(self: Any, c: Any) -> None:
        whole = object.__new__(type(self))
        build(whole, c)
        nn.Module.__init__(self)
        self.c = c
        for name, part in whole.named_children():
            if name not in ("embed_tokens", "lm_head"):
                self.add_module(name, part)

    return init


def layer_61(names: Any) -> property:
    """The published index of one size for all sizes."""

    def spelt(self: Any) -> tuple[tuple[str, str], ...]:
        return tuple(
            ("model.layers.61.", ours) if theirs.startswith("model.layers.") else (theirs, ours)
            for theirs, ours in names.fget(self)
        )

    return property(spelt)


def zeroed(always: bool) -> Callable[[Any], Any]:
    """The embedding at position 0 as if every config, or none, were vLLM's."""

    def mix(self: Any, embed: Tensor, hidden: Tensor, *place: Any) -> Tensor:
        positions, visible, cache, slots, layer = place
        if always:
            embed = embed.masked_fill((positions == 0)[..., None], 0.0)
        block = self.layers[layer]
        y = block(block.project(embed, hidden), positions, visible, layer, cache, slots)
        return block.shared_head["norm"](y)

    return lambda right: mix


def first_layer_always(mix: Any) -> Any:
    return lambda self, *args: mix(self, *args[:-1], 0)


def own_column_alone(start: Any) -> Any:
    """A later layer reads the last column and no other."""

    def step(self: Any, token: Tensor, feedback: Tensor, lengths: Tensor, k: int) -> Step:
        layer = (k - 1) % self.draft.c.layers
        place = (lengths - 1 + (k - 1) // self.draft.c.layers)[:, None]
        return Step(*self.draft(token, feedback, place, self.cache, layer=layer))

    return step


def drafts_left_standing(read: Any) -> Any:
    """Columns before the settled ones are not read again, whatever token was guessed there."""

    def settled_alone(self: Any, following: Tensor, hidden: Tensor, positions: Tensor) -> None:
        read(self, following, hidden, positions)
        self.window[:, : len(self.before)] = -1

    return settled_alone


def always_the_targets(join: Any) -> Any:
    def share(self: Any, target: Any) -> list[Any]:
        self.embed_tokens, self.lm_head = target.embed_tokens, target.lm_head
        return join(self, target)

    return share


def every_head_tied(check: Any) -> Any:
    """Whatever is called a head, the module's too, held to the target's embedding."""

    def compare(todo: Any) -> None:
        table = next((name for ours, name in todo.source.items() if ours == "embed_tokens.weight"), "")
        for tensor in todo.ignored:
            if tensor.endswith("lm_head.weight"):
                assert torch.equal(todo.checkpoint.read(tensor), todo.checkpoint.read(table)), tensor

    return compare


def bug(name: str, origin: str, at: str, make: Callable[[Any], Any], claim: str) -> Bug:
    return Bug(f"mtp-{name}", origin, at, make, claim)


def unread(*names: str) -> Callable[[Any], Any]:
    """A table with more names that nobody reads."""
    return lambda table: (*table, *((name, "not needed") for name in names))


BUGS = (
    bug("hidden-before-embedding", "SGLang list, M28", f"{QWEN}.Qwen3MoeMtpDraft.mix", mixed(True), SPECULATORS),
    bug("one-norm-for-both", "SGLang list, M28", f"{QWEN}.Qwen3MoeMtpDraft.mix", mixed(one_norm=True), SPECULATORS),
    bug("feedback-unnormed", "vLLM #42764's kind", f"{QWEN}.Qwen3MoeMtpDraft.forward", feed_back_unnormed, SPECULATORS),
    bug(
        "final-norm-twice",
        "vLLM deepseek_mtp.py, pre and normed",
        f"{QWEN}.Qwen3MoeMtpDraft.forward",
        norm_twice,
        SPECULATORS,
    ),
    bug(
        "weights-of-experts-as-they-are",
        "norm_topk_prob unread: false by default in transformers, true as published",
        "reference.targets.qwen3_moe.route_softmax",
        lambda route: lambda scores, chosen, normed: route(scores, chosen, False),
        SPECULATORS,
    ),
    bug(
        "renamed-everywhere",
        "SGLang #26468: name.replace",
        "harness.checkpoints.rename",
        renamed_everywhere,
        f"{REFUSED}[mtp.mtp.norm.weight]",
    ),
    bug(
        "other-names-dropped",
        "SGLang #26468: a `continue` before the warning",
        f"{QWEN}.IGNORED",
        unread("layers.*", "*mtp*"),
        f"{REFUSED}[mtp.layers.61.input_layernorm.weight]",
    ),
    bug(
        "a-prefix-unknown",
        "SGLang #26468: model.mtp.layers never loads",
        f"{QWEN}.CHECKPOINT_NAMES",
        lambda table: table[3:],
        f"{CLAIMS}::test_every_spelling_of_the_prefix_is_read[inside the model]",
    ),
    bug(
        "unknown-to-the-target",
        "a checkpoint with a module that no target can open",
        "reference.targets.qwen3_moe.IGNORED",
        lambda table: (),
        f"{ACCOUNT}[qwen3_moe_mtp]",
    ),
    bug(
        "shared-config-made-small",
        "SGLang #26468: num_hidden_layers = 1 in place",
        f"{QWEN}.Qwen3MoeMtpConfig.from_hf",
        one_layer_for_all,
        f"{CLAIMS}::test_reading_changes_no_config[qwen3_moe_mtp]",
    ),
    bug(
        "base-init-skipped",
        "SGLang #26468: nn.Module.__init__ in place of super().__init__",
        f"{QWEN}.Qwen3MoeMtpDraft.__init__",
        without_base,
        f"{ACCOUNT}[qwen3_moe_mtp]",
    ),
    bug(
        "layer-61",
        "SGLang #34906, #30265",
        f"{DEEPSEEK}.DeepseekNextnConfig.names",
        layer_61,
        f"{ACCOUNT}[deepseek_nextn]",
    ),
    bug(
        "first-embedding-zero",
        "vLLM deepseek_mtp.py:123 read as the rule",
        f"{DEEPSEEK}.DeepseekNextnDraft.mix",
        zeroed(True),
        TRANSFORMERS,
    ),
    bug(
        "first-embedding-read",
        "the dialect of vLLM unread",
        f"{DEEPSEEK}.DeepseekNextnDraft.mix",
        zeroed(False),
        f"{CLAIMS}::test_the_first_embedding_is_zero_where_the_config_says_so",
    ),
    bug(
        "first-layer-always",
        "one layer kept of several",
        f"{DEEPSEEK}.DeepseekNextnDraft.mix",
        first_layer_always,
        TRANSFORMERS,
    ),
    bug(
        "later-layer-sees-one-column",
        "engines that run later layers on the last token alone",
        f"{SHARED}.Layered.next",
        own_column_alone,
        SERVED,
    ),
    bug(
        "drafts-left-standing",
        "transformers crops its cache for this",
        f"{TWIN}.Layered.read",
        drafts_left_standing,
        ACCEPTED,
    ),
    bug(
        "own-head-dropped",
        "SGLang: set_embed_and_head in any case",
        f"{SHARED}.NextTokenDraft.join",
        always_the_targets,
        f"{COPIES}[qwen3_moe_mtp]",
    ),
    bug(
        "every-head-is-tied",
        "a reader of tied targets that matched names by their end",
        "suites.catalog._check_tied",
        every_head_tied,
        f"{COPIES}[qwen3_moe_mtp]",
    ),
    bug(
        "copies-not-compared",
        "vLLM: embed_tokens of the first layer alone",
        "suites.joining.check_copies",
        lambda check: lambda *_: None,
        f"{CLAIMS}::test_a_later_layer_has_the_tables_of_the_first",
    ),
)
