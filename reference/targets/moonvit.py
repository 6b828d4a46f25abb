"""MoonViT, the vision tower of Kimi K2.5: images and clips to squares of patches.

    (1)  p_0 = W_patch patch + table(y, x) + wave(f)         wave: sine and cosine of frame f; clips only
    (2)  s_i = p_i + Attn(LN_0(p_i))                         all patches of all frames of a clip see each other
    (3)  p_{i+1} = s_i + W_1 gelu(W_0 LN_1(s_i))
    (4)  m = mean over frames of LN(p)                       in squares of neighbouring patches

table is learned for one grid and resampled to that of each clip (bicubic, a = -0.75, edges repeated). Queries and
keys of (2) turn in pairs of neighbours, pair 2j by the column times theta^(-4j/D), pair 2j + 1 by the row times the
same. An image is a clip of one frame. Reports: arXiv 2504.07491 (the tower), 2602.02276 (clips).
Letters: reference/README.md, and here: P patches of all clips, C channels, F features, U squares, K patches a square.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reference.config import ConfigError, Keys
from reference.ops.attention import attend
from reference.ops.mlp import gelu
from reference.ops.rope import turn_neighbours

# the hub's names of facts of the tower, and transformers'
TOWER_KEYS = {
    "vt_hidden_size": "hidden_size",
    "vt_intermediate_size": "intermediate_size",
    "vt_num_attention_heads": "num_attention_heads",
    "vt_num_hidden_layers": "num_hidden_layers",
    "init_pos_emb_height": "pos_emb_height",
    "init_pos_emb_width": "pos_emb_width",
    "init_pos_emb_time": "pos_emb_time",
}


@dataclass(frozen=True)
class MoonVitConfig:
    """Every fact that changes the equations above, and of the projector behind them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    patch_size: int
    table: tuple[int, int]
    """height and width of the grid that positions were learned on"""
    frames: int
    """of a clip, at most"""
    square: tuple[int, int] = (2, 2)
    """patches, down and across, that become one token"""
    theta: float = 10_000.0
    projector_eps: float = 1e-5

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], path: str, hidden: int, projector_eps: float | None) -> "MoonVitConfig":
        """Read `vision_config`; `hidden` is the text model's; errors: ConfigError."""
        keys = Keys(_renamed(config, path), path)
        keys.get("_attn_implementation")
        keys.expect("hidden_act", "gelu_pytorch_tanh")
        keys.expect("pos_emb_type", "divided_fixed")
        keys.expect("video_attn_type", "spatial_temporal")
        keys.expect("merge_type", "sd2_tpool")
        keys.expect("mm_projector_type", "patchmerger")
        keys.expect("projector_hidden_act", "gelu")
        keys.expect("text_hidden_size", hidden)
        width, heads = keys.count("hidden_size"), keys.count("num_attention_heads")
        keys.expect("mm_hidden_size", width)
        rope = keys.below("rope_parameters")
        rope.expect("rope_type", "axial")
        square = keys.get("merge_kernel_size", (2, 2))
        if not isinstance(square, list | tuple) or [type(n) for n in square] != [int, int] or min(square) < 1:
            raise ConfigError(f"config key {path + 'merge_kernel_size'!r} is {square!r}; two counts are expected")
        if width % (4 * heads):
            raise ConfigError(
                f"config key {path + 'hidden_size'!r} is {width}; {heads} heads of a multiple of four are expected"
            )
        eps = keys.number("projector_ln_eps", 1e-5)
        facts = cls(
            hidden=width,
            intermediate=keys.count("intermediate_size"),
            layers=keys.count("num_hidden_layers"),
            heads=heads,
            patch_size=keys.count("patch_size"),
            table=(keys.count("pos_emb_height"), keys.count("pos_emb_width")),
            frames=keys.count("pos_emb_time"),
            square=(square[0], square[1]),
            theta=rope.number("rope_theta", 10_000.0),
            projector_eps=eps if projector_eps is None else projector_eps,
        )
        rope.finish()
        keys.finish()
        return facts


def _renamed(config: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The config under transformers' names; ConfigError where it says one thing twice and differently."""
    given = dict(config)
    for theirs, ours in TOWER_KEYS.items():
        value = given.pop(theirs, None)
        if value is not None and given.setdefault(ours, value) != value:
            raise ConfigError(f"config keys {path + theirs!r} and {path + ours!r} differ; keep one of them")
    return given


def cubic_taps(size: int, into: int) -> tuple[Tensor, Tensor]:
    """Which four of `size` points each of `into` equally spaced ones reads, and how much of each.

    Weights are float32 in every dtype of the model, as rope's angles are.
    ->  [into, 4], [into, 4]
    """
    source = (torch.arange(into, dtype=torch.float32) + 0.5) * size / into - 0.5
    first = source.floor()
    offsets = torch.arange(-1, 3)
    d = (source[:, None] - first[:, None] - offsets).abs()
    a = -0.75
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return (first.long()[:, None] + offsets).clamp(0, size - 1), torch.where(d <= 1, near, far)


def resample(table: Tensor, height: int, width: int) -> Tensor:
    """A learned grid at another size.

    table  [Y, X, F]
    ->     [height, width, F]
    """
    rows, row_weights = (t.to(table.device) for t in cubic_taps(table.shape[0], height))
    columns, column_weights = (t.to(table.device) for t in cubic_taps(table.shape[1], width))
    grid = table.new_zeros(height, width, table.shape[2])
    for i in range(4):
        for j in range(4):
            weight = row_weights[:, None, i] * column_weights[None, :, j]
            grid = grid + weight[..., None].to(table.dtype) * table[rows[:, None, i], columns[None, :, j]]
    return grid


def waves(frames: int, width: int, device: torch.device) -> Tensor:
    """Sine, then cosine, of each frame's number.

    ->  [frames, width]
    """
    frequency = 1.0 / 10_000 ** (torch.arange(0, width, 2, device=device).float() / width)
    angle = torch.arange(frames, device=device).float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def grid_angles(frames: int, height: int, width: int, head_dim: int, theta: float, device: torch.device) -> Tensor:
    """The angle of every pair of a head for every patch of a clip, frame by frame, row by row.

    ->  [P, head_dim/2]
    """
    frequency = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    rows, columns = torch.arange(height, device=device).float(), torch.arange(width, device=device).float()
    place = torch.stack([columns.expand(height, width), rows[:, None].expand(height, width)], -1).flatten(0, 1)
    return (place[:, None, :] * frequency[:, None]).flatten(1).repeat(frames, 1)


class PositionTable(nn.Module):
    """The two positions of equation (1)."""

    def __init__(self, c: MoonVitConfig) -> None:
        super().__init__()
        self.frames = c.frames
        self.weight = nn.Parameter(torch.zeros(*c.table, c.hidden))

    def forward(self, frames: int, height: int, width: int) -> Tensor:
        """One position a patch of a clip: [frames * height * width, F]; errors: ValueError for too many frames."""
        if frames > self.frames:
            raise ValueError(f"a clip has {frames} frames; the tower reads {self.frames} at most")
        place = resample(self.weight, height, width).flatten(0, 1).repeat(frames, 1)
        if frames == 1:
            return place
        wave = waves(frames, self.weight.shape[2], self.weight.device).to(place.dtype)
        return place + wave.repeat_interleave(height * width, 0)


class MoonVitMLP(nn.Module):
    """The two-layer block of equation (3)."""

    def __init__(self, c: MoonVitConfig) -> None:
        super().__init__()
        self.fc0, self.fc1 = nn.Linear(c.hidden, c.intermediate), nn.Linear(c.intermediate, c.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [P, F] -> [P, F]"""
        return self.fc1(gelu(self.fc0(x)))


class MoonVitLayer(nn.Module):
    """Equations (2) and (3), for one clip."""

    def __init__(self, c: MoonVitConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.norm0, self.norm1 = nn.LayerNorm(c.hidden), nn.LayerNorm(c.hidden)
        self.wqkv, self.wo = nn.Linear(c.hidden, 3 * c.hidden), nn.Linear(c.hidden, c.hidden)
        self.mlp = MoonVitMLP(c)

    def forward(self, p: Tensor, angles: Tensor) -> Tensor:
        """Every patch reads every patch.

        p       [P, F]
        angles  [P, D/2]
        ->      [P, F]
        """
        s = p + self.wo(self.attend(self.wqkv(self.norm0(p)), angles))  # (2)
        return s + self.mlp(self.norm1(s))  # (3)

    def attend(self, qkv: Tensor, angles: Tensor) -> Tensor:
        """The heads of equation (2).

        qkv     [P, 3F]
        angles  [P, D/2]
        ->      [P, F]
        """
        q, k, v = qkv.unflatten(-1, (3, 1, self.heads, -1)).permute(1, 2, 0, 3, 4)  # each [1, P, N, D]
        cos, sin = (t.to(qkv.dtype)[:, None] for t in (angles.cos(), angles.sin()))
        q, k = turn_neighbours(q, cos, sin), turn_neighbours(k, cos, sin)
        everyone = torch.ones(1, len(qkv), len(qkv), dtype=torch.bool, device=qkv.device)
        return attend(q, k, v, everyone, q.shape[-1] ** -0.5)[0].flatten(1)


class MoonVitTower(nn.Module):
    """Equations (1) to (4)."""

    def __init__(self, c: MoonVitConfig) -> None:
        super().__init__()
        self.c = c
        patch = nn.Conv2d(3, c.hidden, c.patch_size, stride=c.patch_size)
        self.patch_embed = nn.ModuleDict({"proj": patch, "pos_emb": PositionTable(c)})
        blocks = nn.ModuleList(MoonVitLayer(c) for _ in range(c.layers))
        self.encoder = nn.ModuleDict({"blocks": blocks, "final_layernorm": nn.LayerNorm(c.hidden)})

    def forward(self, pixel_values: Tensor, grid_thw: Tensor) -> Tensor:
        """All clips, one after the other, as squares of patches; errors: ValueError for grids that do not fit.

        pixel_values  [P, C, Y, X]
        grid_thw      [I, 3]        frames, rows and columns of patches of each clip
        ->            [U, K, F]     K patches a square, in reading order
        """
        grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
        sizes, (down, across) = [t * h * w for t, h, w in grids], self.c.square
        if sum(sizes) != len(pixel_values) or any(h % down or w % across for _, h, w in grids):
            raise ValueError(
                f"grids {grids} of {sum(sizes)} patches do not fit {len(pixel_values)} patches in squares of "
                f"{down} by {across}"
            )
        patch = self.patch_embed["proj"]
        embedded = patch(pixel_values.to(patch.weight.dtype)).flatten(1)
        return torch.cat([self.clip(p, *grid) for p, grid in zip(embedded.split(sizes), grids, strict=True)])

    def clip(self, p: Tensor, frames: int, height: int, width: int) -> Tensor:
        """One clip.

        p   [P, F]
        ->  [U, K, F]
        """
        p = p + self.patch_embed["pos_emb"](frames, height, width)  # (1)
        dims = (self.c.hidden // self.c.heads, self.c.theta)
        angles = grid_angles(frames, height, width, *dims, p.device)
        for block in self.encoder["blocks"]:
            p = block(p, angles)
        m = self.encoder["final_layernorm"](p).unflatten(0, (frames, height, width)).mean(0)  # (4)
        down, across = self.c.square
        squares = m.unflatten(1, (width // across, across)).unflatten(0, (height // down, down))
        return squares.transpose(1, 2).flatten(2, 3).flatten(0, 1)
