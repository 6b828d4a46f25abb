"""The vision tower of Gemma 4: patches of an image, or of a frame of a video, to squares of patches.

    (1)  p_0 = W_patch (2x - 1) + E_0[column] + E_1[row]     x: the pixels of a patch; a table of positions each axis
    (2)  u = norm_in(p_i);  q = rope(norm_q(W_q u)),  k = rope(norm_k(W_k u)),  v = norm_1(W_v u)
    (3)  s_i = p_i + norm_post(W_o Attn(q, k, v))            all patches of an image see all; scores are not scaled
    (4)  n = norm_pre(s_i);  p_{i+1} = s_i + norm_ffw(W_down (gelu(W_gate n) * W_up n))
    (5)  f = sqrt(F) times the mean of p over a square of neighbouring patches
    (6)  f <- (f - bias) * scale                             if standardized

The first half of a head turns by the column, the second by the row; norm_1 has no weight. Every W of (2) to (4) stands
between two clamps if `clipped`. A patch whose column and row are both -1 fills up a batch: nobody sees it, and it is in
no square. Norms are those of gemma4.py. Source: transformers `modeling_gemma4.py`.
Letters: reference/README.md, and here: I images, P patches, C numbers a patch, F features, M squares of all images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.attention import attend
from reference.ops.clipped import ClippedLinear
from reference.ops.mlp import gelu
from reference.ops.norm import WideRMSNorm
from reference.ops.rope import Rope, rotate


@dataclass(frozen=True)
class Gemma4VisionConfig:
    """Every fact that changes the equations above."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    patch_size: int
    square: int
    """patches along one side of a square that becomes one token"""
    positions: int
    """columns, and rows, that have an embedding"""
    theta: float = 100.0
    eps: float = 1e-6
    clipped: bool = False
    standardized: bool = False

    @classmethod
    def from_hf(cls, keys: Keys) -> "Gemma4VisionConfig":
        """Read `vision_config`; what a file leaves out is as in transformers; errors: ConfigError."""
        keys.expect("hidden_activation", "gelu_pytorch_tanh")
        keys.expect("attention_bias", False)
        for name in ("default_output_length", "global_head_dim", "max_position_embeddings"):
            keys.get(name)  # of the processor, of the text model, and a bound that nothing reads
        rope = keys.below("rope_parameters")
        rope.expect("rope_type", "axial", "default")  # two names of one rope
        facts = cls(
            hidden=keys.count("hidden_size", 768),
            intermediate=keys.count("intermediate_size", 3072),
            layers=keys.count("num_hidden_layers", 16),
            heads=keys.count("num_attention_heads", 12),
            kv_heads=keys.count("num_key_value_heads", 12),
            head_dim=keys.count("head_dim", 64),
            patch_size=keys.count("patch_size", 16),
            # squares of one patch: transformers 5.17 then keeps the filling in place of the patches
            square=keys.count("pooling_kernel_size", 3, 2),
            positions=keys.count("position_embedding_size", 10_240),
            theta=rope.number("rope_theta", 100.0),
            eps=keys.number("rms_norm_eps", 1e-6),
            clipped=keys.flag("use_clipped_linears"),
            standardized=keys.flag("standardize"),
        )
        rope.finish()
        keys.finish()
        if facts.heads % facts.kv_heads or facts.head_dim % 4:
            raise ConfigError(
                f"config keys {keys.path}*: {facts.heads} heads over {facts.kv_heads} key/value heads, each "
                f"{facts.head_dim} wide; a multiple of them is expected, and a multiple of four"
            )
        return facts


class Gemma4PatchEmbedder(nn.Module):
    """Equation (1)."""

    def __init__(self, c: Gemma4VisionConfig) -> None:
        super().__init__()
        self.input_proj = nn.Linear(3 * c.patch_size**2, c.hidden, bias=False)
        self.position_embedding_table = nn.Parameter(torch.zeros(2, c.positions, c.hidden))

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Embed every patch; what fills up the batch is at column and row 0.

        pixels  [I, P, C]
        places  [I, P, 2]
        ->      [I, P, F]
        """
        columns, rows = self.position_embedding_table
        column, row = places.clamp(min=0).unbind(-1)
        return self.input_proj((2 * (pixels - 0.5)).to(columns.dtype)) + (columns[column] + rows[row])


class Gemma4VisionAttention(nn.Module):
    """Equation (2) and the sum of (3)."""

    def __init__(self, c: Gemma4VisionConfig) -> None:
        super().__init__()
        self.head_dim, self.rope = c.head_dim, Rope(c.head_dim // 2, c.theta)
        self.q_proj = ClippedLinear(c.hidden, c.heads * c.head_dim, c.clipped)
        self.k_proj = ClippedLinear(c.hidden, c.kv_heads * c.head_dim, c.clipped)
        self.v_proj = ClippedLinear(c.hidden, c.kv_heads * c.head_dim, c.clipped)
        self.o_proj = ClippedLinear(c.heads * c.head_dim, c.hidden, c.clipped)
        self.q_norm, self.k_norm = WideRMSNorm(c.head_dim, c.eps), WideRMSNorm(c.head_dim, c.eps)
        self.v_norm = WideRMSNorm(None, c.eps)

    def turn(self, x: Tensor, places: Tensor) -> Tensor:
        """The first half of every head by its column, the second by its row.

        x       [I, P, N, D]
        places  [I, P, 2]
        ->      [I, P, N, D]
        """
        halves = zip(x.chunk(2, -1), places.unbind(-1), strict=True)
        return torch.cat([rotate(half, place, self.rope) for half, place in halves], -1)

    def forward(self, u: Tensor, places: Tensor, visible: Tensor) -> Tensor:
        """Attend from every patch to the visible ones.

        u        [I, P, F]
        places   [I, P, 2]
        visible  [I, P, P]
        ->       [I, P, F]
        """
        q, k, v = (project(u).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.turn(self.q_norm(q), places), self.turn(self.k_norm(k), places)
        return self.o_proj(attend(q, k, self.v_norm(v), visible, 1.0).flatten(2))


class Gemma4VisionMLP(nn.Module):
    """The gated block of equation (4)."""

    def __init__(self, c: Gemma4VisionConfig) -> None:
        super().__init__()
        self.gate_proj = ClippedLinear(c.hidden, c.intermediate, c.clipped)
        self.up_proj = ClippedLinear(c.hidden, c.intermediate, c.clipped)
        self.down_proj = ClippedLinear(c.intermediate, c.hidden, c.clipped)

    def forward(self, x: Tensor) -> Tensor:
        """x [I, P, F] -> [I, P, F]"""
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class Gemma4VisionLayer(nn.Module):
    """Equations (2) to (4)."""

    def __init__(self, c: Gemma4VisionConfig) -> None:
        super().__init__()
        self.input_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.self_attn = Gemma4VisionAttention(c)
        self.post_attention_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.pre_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)
        self.mlp = Gemma4VisionMLP(c)
        self.post_feedforward_layernorm = WideRMSNorm(c.hidden, c.eps)

    def forward(self, p: Tensor, places: Tensor, visible: Tensor) -> Tensor:
        """One layer.

        p        [I, P, F]
        places   [I, P, 2]
        visible  [I, P, P]
        ->       [I, P, F]
        """
        s = p + self.post_attention_layernorm(self.self_attn(self.input_layernorm(p), places, visible))  # (2) (3)
        return s + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(s)))  # (4)


class Gemma4VisionTower(nn.Module):
    """Equations (1) to (6)."""

    def __init__(self, c: Gemma4VisionConfig) -> None:
        super().__init__()
        self.c = c
        self.patch_embedder = Gemma4PatchEmbedder(c)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(Gemma4VisionLayer(c) for _ in range(c.layers))})
        if c.standardized:
            self.register_buffer("std_bias", torch.zeros(c.hidden))
            self.register_buffer("std_scale", torch.ones(c.hidden))

    def forward(self, pixels: Tensor, places: Tensor) -> Tensor:
        """Squares in reading order, image by image; errors: ValueError for patches that fill no grid of squares.

        pixels  [I, P, C]
        places  [I, P, 2]  column and row, -1 and -1 for filling
        ->      [M, F]
        """
        self.check(places)
        real = (places != -1).any(-1)
        visible = real[:, None, :].expand(-1, real.shape[1], -1)
        p = self.patch_embedder(pixels, places)  # (1)
        for layer in self.encoder["layers"]:
            p = layer(p, places, visible)
        images = zip(p, places, real, strict=True)
        return torch.cat([self.pool(patches[kept], at[kept]) for patches, at, kept in images])

    def pool(self, p: Tensor, places: Tensor) -> Tensor:
        """Equations (5) and (6), for one image without its filling.

        p       [P, F]
        places  [P, 2]
        ->      [M, F]
        """
        wide = p if p.dtype == torch.float64 else p.float()
        column, row = (places // self.c.square).unbind(-1)
        across, down = int(column.max()) + 1, int(row.max()) + 1
        sums = wide.new_zeros(across * down, p.shape[1]).index_add(0, column + across * row, wide)
        # rounded once as a mean; what follows may leave the range of float16 and stays wide
        f = (sums / self.c.square**2).to(p.dtype).to(wide.dtype) * self.c.hidden**0.5  # (5)
        if self.c.standardized:
            f = (f - self.std_bias.to(f.dtype)) * self.std_scale.to(f.dtype)  # (6)
        return f.to(p.dtype)

    def check(self, places: Tensor) -> None:
        """Refuse what readers would pool differently; errors: ValueError.

        places  [I, P, 2]
        """
        side = self.c.square
        for number, at in enumerate(places):
            held = {(x, y) for x, y in at.tolist() if (x, y) != (-1, -1)}
            columns, rows = (max((place[axis] for place in held), default=-1) + 1 for axis in (0, 1))
            grid = {(x, y) for x in range(columns) for y in range(rows)}
            filling = int((at == -1).all(-1).sum())
            if not held or held != grid or len(held) + filling != len(at) or columns % side or rows % side:
                raise ValueError(
                    f"patches of image {number} fill no grid of {columns} by {rows} in squares of {side} by {side}; "
                    "each place once, -1 and -1 for filling"
                )
            if max(columns, rows) > self.c.positions:
                raise ValueError(
                    f"image {number} has {columns} columns and {rows} rows; embeddings are there for {self.c.positions}"
                )
