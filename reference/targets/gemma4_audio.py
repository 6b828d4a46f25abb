"""The audio tower of Gemma 4: frames of a spectrum to a quarter as many tokens, by convolutions and a conformer.

    (1)  x <- relu(LN(Conv x)), twice; h_0 = W_in x          3 by 3, stride 2; LN over channels, without a bias
    (2)  a = h_i + r norm_b(W_2 silu(W_1 norm_a(h_i)))
    (3)  u = norm_in(a);  q = softplus(g) D^-1/2 / ln 2 * W_q u,  k = log_2(1 + e) W_k u,  v = W_v u
    (4)  e_tj = c tanh(q_t . (k_j + W_rel wave(t - j + z)) / c)               wave(m) = 0 where m < 0
    (5)  b = a + norm_post(W_o sum_j softmax_j(e_tj) v_j)    -ahead < t - j < reach, ahead and reach at least 1
    (6)  d = b + W_end silu(norm_conv(Conv GLU(W_start norm_pre(b))))         each channel alone, K frames up to its own
    (7)  h_{i+1} = norm_out(d + r norm_d(W_4 silu(W_3 norm_c(d))))
    (8)  f = W_out h_L + bias

wave(m) has sin(m t_i) and then cos(m t_i), t_i from 1 down to 1/10000 in equal ratios. Engines attend in chunks; all
that is left of a chunk here is z = (chunk + left - 1 + right) // 2 - (left - 1), which is 0 in published files. What
enters and leaves the blocks of (2), (5) and (7), the convolution of (6) and the sum of (7) is clamped to +-limit. Every
W of (2) to (7) but W_rel stands between two clamps of its own if `clipped`. Norms have the config's eps in (1) and (6)
alone, elsewhere 1e-6.

A sound is its real frames: what fills up a batch behind them is dropped first. Reports: arXiv 2303.01037, 2005.08100.
Source: transformers `modeling_gemma4.py`.  Letters: reference/README.md, and here: U sounds, R frames, Z numbers a
frame, T tokens of one sound, F features, M tokens of all sounds, X features out.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from reference.config import ConfigError, Keys
from reference.ops.clipped import ClippedLinear
from reference.ops.norm import WideRMSNorm

EPS = 1e-6
"""of the norms of (2), (5) and (7)"""
UNSEEN = -1e4
"""a score from here on down has no weight"""


@dataclass(frozen=True)
class Gemma4AudioConfig:
    """Every fact that changes the equations above."""

    hidden: int
    layers: int
    heads: int
    channels: tuple[int, int]
    """of the two convolutions of (1)"""
    out: int
    kernel: int = 5
    """frames that the convolution of (6) reads"""
    residual: float = 0.5
    """r"""
    chunk: int = 12
    left: int = 13
    right: int = 0
    cap: float = 50.0
    limit: float = 1e10
    eps: float = 1e-6
    clipped: bool = True

    @property
    def reach(self) -> int:
        """Tokens up to its own that a token sees, its own included."""
        return self.left - 1

    @property
    def farthest(self) -> int:
        """The largest m with a wave."""
        return (self.chunk + self.left - 1 + self.right) // 2

    @property
    def shift(self) -> int:
        """z"""
        return self.farthest - (self.left - 1)

    @classmethod
    def from_hf(cls, keys: Keys) -> "Gemma4AudioConfig":
        """Read `audio_config`; what a file leaves out is as in transformers; errors: ConfigError."""
        keys.expect("hidden_act", "silu")
        channels = keys.get("subsampling_conv_channels", (128, 32))
        if not isinstance(channels, list | tuple) or [type(n) for n in channels] != [int, int] or min(channels) < 1:
            raise ConfigError(f"config key {keys.path + 'subsampling_conv_channels'!r} is {channels!r}; two counts")
        unseen = keys.get("attention_invalid_logits_value", -1e9)
        if not isinstance(unseen, int | float) or not unseen <= UNSEEN:
            raise ConfigError(
                f"config key {keys.path + 'attention_invalid_logits_value'!r} is {unseen!r}; what is out of sight "
                f"would have weight: {UNSEEN} or less is expected"
            )
        facts = cls(
            hidden=keys.count("hidden_size", 1024),
            layers=keys.count("num_hidden_layers", 12),
            heads=keys.count("num_attention_heads", 8),
            channels=(channels[0], channels[1]),
            out=keys.count("output_proj_dims", 1536),
            kernel=keys.count("conv_kernel_size", 5),
            residual=keys.number("residual_weight", 0.5),
            chunk=keys.count("attention_chunk_size", 12),
            left=keys.count("attention_context_left", 13, 2),
            right=keys.count("attention_context_right", 0, 0),
            cap=keys.number("attention_logit_cap", 50.0),
            limit=keys.number("gradient_clipping", 1e10),
            eps=keys.number("rms_norm_eps", 1e-6),
            clipped=keys.flag("use_clipped_linears", True),
        )
        keys.finish()
        if facts.hidden % (2 * facts.heads) or facts.channels[0] < 4:
            raise ConfigError(
                f"config keys {keys.path}*: {facts.hidden} features in {facts.heads} heads, {facts.channels} channels; "
                "an even number a head is expected, and four channels at least"
            )
        return facts


def bounded(x: Tensor, limit: float) -> Tensor:
    """x [T, F] -> [T, F], within +-limit and what its dtype holds"""
    limit = min(limit, torch.finfo(x.dtype).max)
    return x.clamp(-limit, limit)


def waves(farthest: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sines, then cosines, of the distances 0 to farthest.

    ->  [farthest + 1, F]
    """
    # frequencies are float32 in every dtype of the model, as those of ropes are
    frequency = torch.exp(torch.arange(width // 2, dtype=torch.float32) * -(math.log(1e4) / max(width // 2 - 1, 1)))
    wide = dtype if dtype == torch.float64 else torch.float32
    angle = torch.arange(farthest + 1, dtype=wide)[:, None] * frequency.to(wide)
    return torch.cat([angle.sin(), angle.cos()], -1).to(device, dtype)


class Gemma4Subsampling(nn.Module):
    """One convolution of equation (1)."""

    def __init__(self, into: int, out: int, eps: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(into, out, 3, stride=2, padding=1, bias=False)
        self.norm = nn.LayerNorm(out, eps, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Half as many frames, half as many rows, both rounded up.

        x   [K, R, Z]  K channels in, E out
        ->  [E, T, Y]
        """
        return F.relu(self.norm(self.conv(x[None])[0].movedim(0, -1)).movedim(-1, 0))


class Gemma4Subsample(nn.Module):
    """Equation (1)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.rows = c.channels[0] // 4
        self.layer0 = Gemma4Subsampling(1, c.channels[0], c.eps)
        self.layer1 = Gemma4Subsampling(c.channels[0], c.channels[1], c.eps)
        self.input_proj_linear = nn.Linear(self.rows * c.channels[1], c.hidden, bias=False)

    def forward(self, sound: Tensor) -> Tensor:
        """One sound without filling; errors: ValueError.

        sound  [R, Z]
        ->     [T, F]
        """
        x = self.layer1(self.layer0(sound[None].to(self.input_proj_linear.weight.dtype)))
        if x.shape[2] != self.rows:
            raise ValueError(
                f"a frame of sound has {sound.shape[1]} numbers; {4 * self.rows} are expected, a quarter is {self.rows}"
            )
        return self.input_proj_linear(x.movedim(0, -1).flatten(1))  # pitch first, then channel


class Gemma4AudioFeedForward(nn.Module):
    """Equation (2), and the same again in (7)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.residual, self.limit = c.residual, c.limit
        self.pre_layer_norm, self.post_layer_norm = WideRMSNorm(c.hidden, EPS), WideRMSNorm(c.hidden, EPS)
        self.ffw_layer_1 = ClippedLinear(c.hidden, 4 * c.hidden, c.clipped)
        self.ffw_layer_2 = ClippedLinear(4 * c.hidden, c.hidden, c.clipped)

    def forward(self, h: Tensor) -> Tensor:
        """h [T, F] -> [T, F]"""
        n = self.pre_layer_norm(bounded(h, self.limit))
        n = self.ffw_layer_2(F.silu(self.ffw_layer_1(n)))
        return self.post_layer_norm(bounded(n, self.limit)) * self.residual + h


class Gemma4AudioAttention(nn.Module):
    """Equations (3) and (4), and the sum of (5)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.c, self.head_dim = c, c.hidden // c.heads
        self.q_proj, self.k_proj, self.v_proj, self.post = (
            ClippedLinear(c.hidden, c.hidden, c.clipped) for _ in range(4)
        )
        self.relative_k_proj = nn.Linear(c.hidden, c.hidden, bias=False)
        self.per_dim_scale = nn.Parameter(torch.zeros(self.head_dim))

    def near(self, q: Tensor, distance: Tensor) -> Tensor:
        """What a query has to say to each distance: q_t . W_rel wave(t - j + z).

        q         [T, N, D]
        distance  [T, T]     t - j
        ->        [N, T, T]
        """
        w, m = self.relative_k_proj.weight, distance + self.c.shift
        known = self.relative_k_proj(waves(self.c.farthest, self.c.hidden, w.dtype, w.device))
        said = torch.einsum("tnd,mnd->ntm", q, known.unflatten(-1, (-1, self.head_dim)).to(q.dtype))
        index = m.clamp(0, self.c.farthest).expand(len(said), -1, -1)
        return said.gather(-1, index).masked_fill(m < 0, 0.0)

    def forward(self, u: Tensor) -> Tensor:
        """u [T, F] -> [T, F]"""
        q, k, v = (project(u).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        q = q * (self.head_dim**-0.5 / math.log(2)) * F.softplus(self.per_dim_scale)
        k = k * math.log2(1 + math.e)  # (3)
        at = torch.arange(len(u), device=u.device)
        distance = at[:, None] - at
        scores = torch.einsum("tnd,jnd->ntj", q, k) + self.near(q, distance)
        scores = (scores / self.c.cap).tanh() * self.c.cap  # (4)
        visible = (distance < self.c.reach) & (distance > -max(self.c.right, 1))
        weight = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return self.post(torch.einsum("ntj,jnd->tnd", weight, v).flatten(1).to(u.dtype))


class Gemma4LightConv(nn.Module):
    """Equation (6)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.limit, self.kernel = c.limit, c.kernel
        self.pre_layer_norm, self.conv_norm = WideRMSNorm(c.hidden, c.eps), WideRMSNorm(c.hidden, c.eps)
        self.linear_start = ClippedLinear(c.hidden, 2 * c.hidden, c.clipped)
        self.depthwise_conv1d = nn.Conv1d(c.hidden, c.hidden, c.kernel, groups=c.hidden, bias=False)
        self.linear_end = ClippedLinear(c.hidden, c.hidden, c.clipped)

    def forward(self, b: Tensor) -> Tensor:
        """b [T, F] -> [T, F]"""
        x = F.glu(self.linear_start(self.pre_layer_norm(b)), -1)
        x = self.depthwise_conv1d(F.pad(x.T, (self.kernel - 1, 0))).T
        return self.linear_end(F.silu(self.conv_norm(bounded(x, self.limit)))) + b


class Gemma4AudioLayer(nn.Module):
    """Equations (2) to (7)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.limit = c.limit
        self.feed_forward1, self.feed_forward2 = Gemma4AudioFeedForward(c), Gemma4AudioFeedForward(c)
        self.self_attn, self.lconv1d = Gemma4AudioAttention(c), Gemma4LightConv(c)
        self.norm_pre_attn, self.norm_post_attn = WideRMSNorm(c.hidden, EPS), WideRMSNorm(c.hidden, EPS)
        self.norm_out = WideRMSNorm(c.hidden, EPS)

    def forward(self, h: Tensor) -> Tensor:
        """h [T, F] -> [T, F]"""
        a = self.feed_forward1(h)  # (2)
        heard = self.self_attn(self.norm_pre_attn(bounded(a, self.limit)))  # (3) (4)
        b = a + self.norm_post_attn(bounded(heard, self.limit))  # (5)
        d = self.lconv1d(b)  # (6)
        return self.norm_out(bounded(self.feed_forward2(d), self.limit))  # (7)


class Gemma4AudioTower(nn.Module):
    """Equations (1) to (8)."""

    def __init__(self, c: Gemma4AudioConfig) -> None:
        super().__init__()
        self.subsample_conv_projection = Gemma4Subsample(c)
        self.layers = nn.ModuleList(Gemma4AudioLayer(c) for _ in range(c.layers))
        self.output_proj = nn.Linear(c.hidden, c.out)

    def forward(self, sounds: Tensor, mask: Tensor) -> Tensor:
        """The tokens of all sounds, one after the other; errors: ValueError for filling that is not at the end.

        sounds  [U, R, Z]
        mask    [U, R]     true for sound, false for filling
        ->      [M, X]
        """
        lengths = mask.bool().sum(1)
        real = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
        if not bool(lengths.all()) or not torch.equal(mask.bool(), real):
            raise ValueError("input_features_mask must be true up to the end of each sound, and false behind it")
        return torch.cat([self.hear(sound[:length]) for sound, length in zip(sounds, lengths.tolist(), strict=True)])

    def hear(self, sound: Tensor) -> Tensor:
        """One sound.

        sound  [R, Z]
        ->     [T, X]
        """
        h = self.subsample_conv_projection(sound)  # (1)
        for layer in self.layers:
            h = layer(h)
        return self.output_proj(h)  # (8)
