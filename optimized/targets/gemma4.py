"""Gemma 4 text, fast: the equations of `reference/targets/gemma4.py` in nine kernels a dense layer.

    two norms + add | qkv | head norms, rope + KV write | attend: chunks, merge | o | two norms + add
    | gate, up, gelu | down

16 kernels with experts beside the dense block:

    | router's norm | router: product, softmax, top-P | norm_c | experts: gate, up, gelu | experts: down, weighted sum
    | norm_a | norm_b + add

and four more with an input of its own for every layer: | norm_ffw + add | gate | gelu, product | out. What a block
adds is normed where the next block's norm reads it: one kernel norms the branch, adds it to the stream, multiplies by
l_i and norms the result. So capture point c is the second result of the norms that open layer c (of the final ones for
c = L): after l_i, before any norm, and over ranks behind the sum of partial products.

A shared layer has no keys and values of its own, so the cache holds none for it; it reads its donor's. Rows are
flattened, M = B*T, between `tokens` and the outputs. Letters: reference/README.md; U features of a per-layer input, E
experts, P experts a token.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optimized.ops.kinds import GEMMA4
from optimized.ops.table import Ops
from optimized.parallel import (
    GateUpLinear,
    Group,
    Norm,
    PackedModel,
    Part,
    Placement,
    ReplicatedLinear,
    RowLinear,
    VocabEmbedding,
    VocabHead,
    equal_run,
    kv_run,
    stack,
    sum_in_rank_order,
)
from optimized.state import KVCache
from optimized.targets.llama import TargetOutput
from reference.targets.gemma4 import Gemma4Config


class HeadsLinear(Part):
    """The projections of this rank's heads as one weight: q | k | v, q | k where keys are the values too, or q alone.

    heads  how many heads each projection makes: {"q_proj": N, "k_proj": G, ...}
    """

    def __init__(self, prefix: str, into: int, heads: dict[str, int], head_dim: int, bias: bool, at: Placement) -> None:
        super().__init__(at)
        rank, size = at.group.rank, at.group.size
        runs = []
        for name, count in heads.items():
            run = equal_run(count, rank, size, "heads") if name == "q_proj" else kv_run(count, rank, size)
            runs.append((prefix + name, count * head_dim, slice(run.start * head_dim, run.stop * head_dim)))
        stack(self, runs, into, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, (N+2G)*D], [M, (N+G)*D] or [M, N*D] of this rank"""
        return self.ops.linear(x, self.matrix, self.bias)


class RouterScale(Norm):
    """The router's g, asked for as H^-1/2 g."""

    @property
    def matrix(self) -> Tensor:
        """[H]  the weight of the router's norm, float32 (float64), made at first use after loading"""
        if self._packed is None:
            wide = torch.promote_types(self.dtype, torch.float32)
            self._packed = self.weight.to(wide) * self.weight.shape[0] ** -0.5
        return self._packed


class WholeExperts(Part):
    """A run of whole experts, stored as on disk: gate_up [E/W, 2I, H], down [E/W, H, I]."""

    def __init__(self, prefix: str, experts: int, hidden: int, intermediate: int, at: Placement) -> None:
        super().__init__(at)
        run = equal_run(experts, at.group.rank, at.group.size, "experts")
        self.first, held = run.start, run.stop - run.start
        self.gate_up, self.down = self.new(held, 2 * intermediate, hidden), self.new(held, hidden, intermediate)
        self.place(f"{prefix}gate_up_proj", self.gate_up, (experts, 2 * intermediate, hidden), run)
        self.place(f"{prefix}down_proj", self.down, (experts, hidden, intermediate), run)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, on every rank.

        x        [M, H]
        ids      [M, P]
        weights  [M, P]
        ->       [M, H]
        """
        first = None if self.group.size == 1 else self.first
        mixed = self.ops.experts(x, ids, weights, self.gate_up, self.down, "gelu_tanh", first)
        return mixed if self.group.size == 1 else sum_in_rank_order(self.group, mixed)


class CappedHead:
    """A head whose logits pass through (12), which leaves the likeliest token where it is.

    plain  the head itself, which a draft may share: the cap is the target's own
    """

    def __init__(self, plain: VocabHead, cap: float) -> None:
        self.plain, self.cap = plain, cap

    def logits(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M, V] over the whole vocabulary, on every rank"""
        return self.plain.ops.softcap(self.plain.logits(x), self.cap)

    def argmax(self, x: Tensor) -> Tensor:
        """x [M, H] -> [M]"""
        return self.plain.argmax(x)


class Gemma4Attention:
    """Equation (3) and the sum of (4)."""

    def __init__(self, c: Gemma4Config, index: int, name: str, model: PackedModel, at: Placement) -> None:
        self.c, self.ops, self.donor, self.owns = c, at.ops, c.donor(index), not c.is_shared(index)
        self.layer_type, self.kind = c.layer_types[index], c.kind(index)
        kind = self.kind
        heads = {"q_proj": c.heads}
        if self.owns:
            heads |= {"k_proj": kind.kv_heads} | ({} if kind.k_eq_v else {"v_proj": kind.kv_heads})
            self.k_norm = model.own(Norm(f"{name}k_norm.weight", kind.head_dim, c.eps, at))
        self.qkv = model.own(HeadsLinear(name, c.hidden, heads, kind.head_dim, c.attention_bias, at))
        self.q_norm = model.own(Norm(f"{name}q_norm.weight", kind.head_dim, c.eps, at))
        wide = c.heads * kind.head_dim
        self.o_proj = model.own(RowLinear(f"{name}o_proj", wide, c.hidden, c.attention_bias, at))

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        slots: Tensor,
        inv_freq: dict[str, Tensor],
        cache: KVCache,
        num_slots: int | None,
        ends: Tensor | None,
    ) -> Tensor:
        """x [M, H], positions [B, T], slots [M], ends [B, T] or None -> [M, H]"""
        kind, keys, values = self.kind, cache.keys[self.donor], cache.values[self.donor]
        turn = (inv_freq[self.layer_type], kind.rope.scale)
        projected, flat, eps = self.qkv(x), positions.flatten(), self.c.eps
        if self.owns:
            norms = (self.q_norm.weight, self.k_norm.weight, eps, GEMMA4)
            how = {"v_normed": True, "k_eq_v": kind.k_eq_v}
            q = self.ops.qk_rope_kv_write(projected, flat, slots, *turn, keys, values, *norms, **how)
        else:
            heads = projected.unflatten(1, (-1, kind.head_dim))
            q = self.ops.q_rope(heads, flat, *turn, keys.shape[1], self.q_norm.weight, eps, GEMMA4)
        q = q.view(*positions.shape, -1, kind.head_dim)
        ahead = ends if kind.sees_image else None
        mixed = self.ops.attend(q, keys, values, positions, 1.0, kind.window, num_slots, ahead)
        return self.o_proj(mixed.flatten(0, 1))


class Gemma4Mixture:
    """Equations (6) and (7)."""

    def __init__(self, c: Gemma4Config, name: str, model: PackedModel, at: Placement) -> None:
        self.c, self.ops = c, at.ops
        self.scale = model.own(RouterScale(f"{name}router.scale", c.hidden, c.eps, at))
        self.router = model.own(ReplicatedLinear(f"{name}router.proj", c.hidden, c.experts, False, at))
        self.per_expert_scale = model.own(Norm(f"{name}router.per_expert_scale", c.experts, c.eps, at))
        self.experts = model.own(WholeExperts(f"{name}experts.", c.experts, c.hidden, c.expert_intermediate, at))
        self.norm_a, self.norm_b, self.norm_c = (
            model.own(Norm(f"{name}{norm}.weight", c.hidden, c.eps, at))
            for norm in ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2")
        )

    def __call__(self, s: Tensor, f: Tensor) -> Tensor:
        """s [M, H] the stream, f [M, H] what the dense block adds -> [M, H]"""
        ops, eps = self.ops, self.c.eps
        u, _ = ops.add_rmsnorm(s, None, self.scale.matrix, eps, GEMMA4)
        chosen, factors = self.c.experts_per_token, self.per_expert_scale.weight
        ids, weights = ops.route_softmax(u, self.router.matrix, chosen, True, factors, wide=True)  # (6)
        mixed = self.experts(ops.add_rmsnorm(s, None, self.norm_c.weight, eps, GEMMA4)[0], ids, weights)
        dense, _ = ops.add_rmsnorm(f, None, self.norm_a.weight, eps, GEMMA4)
        return ops.sandwich_norm(mixed, dense, self.norm_b.weight, None, eps, GEMMA4)[1]  # (7)


class Gemma4Layer:
    """Equations (3) to (10)."""

    def __init__(self, c: Gemma4Config, index: int, model: PackedModel, at: Placement) -> None:
        self.c, self.ops, name = c, at.ops, f"layers.{index}."
        self.input_layernorm, self.post_attention, self.pre_feedforward, self.post_feedforward = (
            model.own(Norm(f"{name}{norm}_layernorm.weight", c.hidden, c.eps, at))
            for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward")
        )
        self.self_attn = Gemma4Attention(c, index, f"{name}self_attn.", model, at)
        wide = c.intermediate * (c.shared_widening if c.is_shared(index) else 1)
        self.gate_up = model.own(GateUpLinear(f"{name}mlp.", c.hidden, wide, False, at, "gelu_tanh"))
        self.down_proj = model.own(RowLinear(f"{name}mlp.down_proj", wide, c.hidden, False, at))
        self.mixture = Gemma4Mixture(c, name, model, at) if c.experts else None
        self.closing_norm = self.post_feedforward
        if c.per_layer_width:
            gate, out = f"{name}per_layer_input_gate", f"{name}per_layer_projection"
            self.gate = model.own(ReplicatedLinear(gate, c.hidden, c.per_layer_width, False, at))
            self.out = model.own(ReplicatedLinear(out, c.per_layer_width, c.hidden, False, at))
            self.closing_norm = model.own(Norm(f"{name}post_per_layer_input_norm.weight", c.hidden, c.eps, at))
        # one number, replicated as the weights of norms are
        self.layer_scalar = model.own(Norm(f"{name}layer_scalar", 1, c.eps, at))

    def __call__(
        self,
        x: Tensor,
        h: Tensor,
        per_layer: Tensor | None,
        positions: Tensor,
        slots: Tensor,
        inv_freq: dict[str, Tensor],
        cache: KVCache,
        num_slots: int | None,
        ends: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """All of a layer but its end, which `end` leaves to the kernel that opens the next one.

        x          [M, H]  norm_in(h)
        h          [M, H]
        per_layer  [M, U]
        positions  [B, T]
        slots      [M]
        ends       [B, T]  the last position that a token sees where its image does, None for its own
        ->         [M, H], [M, H]  this layer's last branch, the stream without it
        """
        ops, eps = self.ops, self.c.eps
        added = self.self_attn(x, positions, slots, inv_freq, cache, num_slots, ends)
        u, s = ops.sandwich_norm(added, h, self.post_attention.weight, self.pre_feedforward.weight, eps, GEMMA4)  # (4)
        f = self.down_proj(self.gate_up(u))  # (5)
        if self.mixture is not None:
            f = self.mixture(s, f)
        if per_layer is None:
            return f, s
        _, y = ops.sandwich_norm(f, s, self.post_feedforward.weight, None, eps, GEMMA4)  # (8)
        return self.out(ops.act_mul(self.gate(y), per_layer, "gelu_tanh")), y

    def end(self, branch: Tensor, stream: Tensor, following: Norm) -> tuple[Tensor, Tensor]:
        """(8) or (9), (10) and the norm of what follows in one kernel.

        branch  [M, H]
        stream  [M, H]
        ->      [M, H], [M, H]  norm(h_{i+1}), h_{i+1}
        """
        post, scale = self.closing_norm.weight, self.layer_scalar.weight
        return self.ops.sandwich_norm(branch, stream, post, following.weight, self.c.eps, GEMMA4, scale)


class Gemma4Target(PackedModel):
    """One rank's share of the whole target."""

    def __init__(
        self, c: Gemma4Config, ops: Ops, group: Group, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        at = self.at = Placement(ops, group, dtype, torch.device(device))
        self.c = c
        self.embed_tokens = self.own(VocabEmbedding("embed_tokens.weight", c.vocab, c.hidden, at))
        if c.per_layer_width:
            table, model, packed = "embed_tokens_per_layer", "per_layer_model_projection", c.layers * c.per_layer_width
            self.embed_tokens_per_layer = self.own(VocabEmbedding(f"{table}.weight", c.per_layer_vocab, packed, at))
            self.per_layer_model = self.own(ReplicatedLinear(model, c.hidden, packed, False, at))
            self.per_layer_norm = self.own(Norm("per_layer_projection_norm.weight", c.per_layer_width, c.eps, at))
        self.layers = [Gemma4Layer(c, i, self, at) for i in range(c.layers)]
        self.norm = self.own(Norm("norm.weight", c.hidden, c.eps, at))
        tied = self.embed_tokens if c.tied_head else None
        head = self.own(VocabHead("lm_head.weight", c.vocab, c.hidden, at, tied))
        self.lm_head = head if c.softcap is None else CappedHead(head, c.softcap)
        # by kind of layer, one tensor each
        kinds = {c.layer_types[i]: c.kind(i) for i in range(c.layers)}
        self.inv_freq = {layer_type: kind.rope.frequencies().to(device) for layer_type, kind in kinds.items()}

    def new_cache(self, batch: int, num_slots: int) -> KVCache:
        """Room for `num_slots` tokens of each of `batch` sequences in the layers that are not shared."""
        kinds = [self.c.kind(i) for i in range(self.c.layers - self.c.shared_layers)]
        runs = [kv_run(kind.kv_heads, self.at.group.rank, self.at.group.size) for kind in kinds]
        heads, widths = [run.stop - run.start for run in runs], [kind.head_dim for kind in kinds]
        return KVCache(len(kinds), batch, num_slots, heads, widths, self.at.dtype, self.at.device)

    def embed(self, tokens: Tensor) -> Tensor:
        """Equation (1): tokens [B, T] -> [B, T, H]"""
        # a draft that shares the table reads it unscaled
        return self.embed_tokens(tokens.flatten(), self.c.hidden**0.5).unflatten(0, tokens.shape)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        capture: Sequence[int] = (),
        cache: KVCache | None = None,
        **media: Tensor | None,
    ) -> TargetOutput:
        """Predict the token after each of `tokens`; without a cache the tokens see each other alone.

        tokens     [B, T]
        positions  [B, T]  0..T-1 when absent; -1 marks padding, whose outputs mean nothing
        media      what `states` takes of tokens that are no text
        ->         logits [B, T, V], hidden [B, T, H], aux [B, T, A, H]
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        tokens, positions = tokens.contiguous(), positions.contiguous()
        if cache is None:
            cache = self.new_cache(tokens.shape[0], int(positions.max()) + 1)
        hidden, aux = self.states(tokens, positions, cache, capture, **media)
        logits = self.lm_head.logits(hidden.flatten(0, 1)).unflatten(0, tokens.shape)  # (12)
        return TargetOutput(logits, hidden, aux)

    def states(
        self,
        tokens: Tensor,
        positions: Tensor,
        cache: KVCache,
        capture: Sequence[int] = (),
        num_slots: int | None = None,
        aux_out: Tensor | None = None,
        embeds: Tensor | None = None,
        ends: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Everything below the head; reads nothing back from the device.

        tokens     [B, T]
        positions  [B, T]
        num_slots  a bound on position + 1, and on end + 1, that the host knows
        aux_out    [B, T, A, H]  where to put the aux states; new when absent
        embeds     [B, T, H]  h_0 in full: `embed(tokens)` with features in the places of images and sounds
        ends       [B, T]  the last position that a token sees on layers whose kind `sees_image`; None for its own
        ->         [B, T, H], [B, T, A, H]  after the final norm, at the capture points
        """
        slots, ids = cache.slots(positions), tokens.flatten()
        h = (self.embed(tokens) if embeds is None else embeds).flatten(0, 1)  # (1)
        per_layer = self.per_layer_inputs(h, ids) if self.c.per_layer_width else [None] * self.c.layers
        x, h = self.at.ops.add_rmsnorm(h, None, self.layers[0].input_layernorm.weight, self.c.eps, GEMMA4)
        stream = [h]
        after = [*(layer.input_layernorm for layer in self.layers[1:]), self.norm]
        for layer, following, own in zip(self.layers, after, per_layer, strict=True):
            branch, s = layer(x, h, own, positions, slots, self.inv_freq, cache, num_slots, ends)
            x, h = layer.end(branch, s, following)
            stream.append(h)
        hidden = x.unflatten(0, tokens.shape)  # (11)
        if not capture:
            return hidden, hidden.new_empty(*tokens.shape, 0, self.c.hidden)
        rows = [stream[c].unflatten(0, tokens.shape) for c in capture]
        return hidden, torch.stack(rows, 2) if aux_out is None else torch.stack(rows, 2, out=aux_out)

    def per_layer_inputs(self, h: Tensor, ids: Tensor) -> Sequence[Tensor]:
        """Equation (2).

        h    [M, H]  h_0
        ids  [M]
        ->   L times [M, U]
        """
        c, width = self.c, self.c.per_layer_width
        context = (self.per_layer_model(h) * c.hidden**-0.5).view(-1, width)  # [M*L, U]
        normed, _ = self.at.ops.add_rmsnorm(context, None, self.per_layer_norm.weight, c.eps, GEMMA4)
        own = self.embed_tokens_per_layer(ids, width**0.5)
        return ((normed.view_as(own) + own) * 2**-0.5).split(width, 1)
