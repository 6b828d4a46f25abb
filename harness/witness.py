"""transformers as a witness: an outside implementation run from the same config and weights.

The only file that imports transformers. `create` writes a checkpoint of random weights that make mistakes visible:
norms are drawn around the value they start from (a norm of ones hides a skipped weight), biases are not zero.
`Witness.run` reads every capture point with hooks on the layers themselves, since `output_hidden_states` gives the
last one after the final norm.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from harness.checkpoints import CheckpointError

# a progress bar for a checkpoint of a few kilobytes would drown what a claim has to say
transformers.utils.logging.disable_progress_bar()

# what transformers 5.17 writes otherwise than published checkpoints and every other reader: (its prefix, published)
PUBLISHED_NAMES = {
    "kimi_k25": (
        ("language_model.model.blocks.", "language_model.model.layers."),
        ("vision_tower.encoder.patch_embed.", "vision_tower.patch_embed."),
        ("model.mm_projector.", "mm_projector."),
    )
}
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


class WitnessOutput(NamedTuple):
    logits: Tensor
    """[B, T, V]"""
    hidden: Tensor
    """[B, T, H] after the final norm"""
    aux: Tensor
    """[B, T, L+1, H] every capture point, 0..L"""


def create(config: Mapping[str, Any], folder: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint of random weights for a config (as in config.json, `model_type` included).

    Equal seeds give equal weights; they are drawn in float32 and stored in `dtype`.
    """
    model = build(config)
    randomize(model, seed)
    folder = Path(folder)
    model.to(dtype).save_pretrained(folder)
    _publish_names(folder, model.config.model_type)
    return folder


def build(config: Mapping[str, Any]) -> Any:
    """The model of a config, its class by `architectures` where stated, else by `model_type`."""
    facts = dict(config)
    model_type = facts.pop("model_type", None)
    if model_type is None:
        raise CheckpointError("config: model_type is missing, so no implementation can be chosen")
    try:
        parsed = transformers.AutoConfig.for_model(model_type, **facts)
    except ValueError as error:
        raise CheckpointError(f"config: model_type {model_type!r} is not known to transformers: {error}") from error
    parsed._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        # vectors keep their start (see `randomize`), and some start random
        torch.manual_seed(0)
        model = class_of(parsed)._from_config(parsed, dtype=torch.float32)
    return _eager_experts(model).eval()


def preprocess(settings: Mapping[str, Any], pictures: Sequence[Any]) -> Tensor:
    """`pixel_values` of pictures by the processor of a `preprocessor_config.json`, in its form without torchvision.

    ->  [I, C, Y, X]
    """
    processor = getattr(transformers, f"{settings['image_processor_type']}Pil")(**settings)
    return processor(list(pictures), return_tensors="pt")["pixel_values"]


def process(settings: Mapping[str, Any], given: Sequence[Any]) -> Mapping[str, Any]:
    """Every tensor that a processor makes of pictures or waveforms, by name; in its form without torchvision."""
    name = settings.get("feature_extractor_type") or f"{settings['image_processor_type']}Pil"
    return getattr(transformers, name)(**settings)(list(given), return_tensors="pt")


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """What transformers makes of eight bits with a scale for each block, where no block is cut short."""
    # imported where it is asked for: it loads torch's compiler, which takes seconds that no other claim needs
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    made = Fp8Dequantize(None).convert({"weight$": weight, "weight_scale_inv": scale})["weight"]
    assert isinstance(made, Tensor)
    return made


def class_of(config: Any) -> Any:
    """The model class of a parsed config; errors: CheckpointError where transformers has none."""
    for name in config.architectures or ():
        if (found := getattr(transformers, name, None)) is not None:
            return found
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise CheckpointError(f"config: no model class of transformers takes model_type {config.model_type!r}")


def _eager_experts(model: Any) -> Any:
    """The plain loop over experts, where the model has a choice."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def randomize(model: nn.Module, seed: int, spread: float = 0.2) -> None:
    """Fill every parameter and stored buffer in place.

    Matrices keep the size of what they read; vectors (norms, biases, scales) move off the value they start from.
    Attention that does not scale its scores keeps that scale in the norm of its queries, as trained weights do:
    else scores grow with the head's width, and softmax, all but a maximum, multiplies every rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    seen: set[int] = set()
    with torch.no_grad():
        for tensor in model.state_dict(keep_vars=True).values():
            # tied weights appear under several names
            if not tensor.is_floating_point() or tensor.data_ptr() in seen:
                continue
            seen.add(tensor.data_ptr())
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float32)
            if bool(tensor.isinf().all()):
                # the bound of a clamp starts open, where it would be seen to do nothing
                tensor.copy_(tensor.sign() * (1 + spread * noise.abs()))
            elif tensor.dim() < 2:
                tensor.add_(spread * noise)
            else:
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
        attention: Any
        for attention in model.modules():
            if getattr(attention, "scaling", None) == 1.0 and hasattr(attention, "q_norm"):
                attention.q_norm.weight.mul_(attention.head_dim**-0.5)


def _publish_names(folder: Path, model_type: str) -> None:
    renames = PUBLISHED_NAMES.get(model_type, ())
    for file in folder.glob("*.safetensors") if renames else ():
        weights = {}
        for name, tensor in load_file(file).items():
            prefix = next(((old, new) for old, new in renames if name.startswith(old)), None)
            weights[prefix[1] + name[len(prefix[0]) :] if prefix else name] = tensor
        save_file(weights, file, metadata={"format": "pt"})


def load(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> "Witness":
    """Open a checkpoint folder with transformers; CheckpointError where it leaves a tensor out or invents one."""
    config = transformers.AutoConfig.from_pretrained(folder)
    # transformers 5.17 inverts the mask of Gemma 4's audio tower in eager attention
    audio = {"audio_config": "sdpa"} if getattr(config, "audio_config", None) is not None else {}
    attention = {"": "eager", **dict.fromkeys(config.sub_configs, "eager"), **audio}
    model, report = class_of(config).from_pretrained(
        folder, config=config, dtype=dtype, attn_implementation=attention, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            raise CheckpointError(f"{folder}: transformers loads it with {kind} {sorted(map(str, report[kind]))}")
    return Witness(_eager_experts(model).eval().to(device))


class StayWide(TorchFunctionMode):
    """Keep float64 where transformers says float32.

    Its norms and softmax go "up" to float32, which is down for a float64 model; a witness that rounds there would
    be judged by a float32 budget. Rope angles are float32 from the start and stay so; their cosines are those of
    `cos`, from which `polar` differs in the last bit. One-hot rows, which it turns into the weights of a mean, count
    among what a float64 model computes.
    """

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.polar:
            length, angle = args
            return torch.complex(length * angle.cos(), length * angle.sin())
        if func is torch.nn.functional.one_hot and self.dtype == torch.float64:
            return func(*args, **kwargs).double()
        if args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float:
                return args[0]
            if func in (Tensor.to, Tensor.type) and torch.float32 in args[1:]:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


class Witness:
    """A model of transformers that tells what passes through it."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.decoder = model.get_decoder()
        self.layers: Sequence[nn.Module] = list(self.decoder.layers)

    @property
    def config(self) -> Any:
        """The text part of the config."""
        return self.model.config.get_text_config()

    @torch.no_grad()
    def run(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> WitnessOutput:
        """One forward pass without a cache.

        tokens     [B, T]
        positions  [B, T]
        """
        extra: dict[str, Any] = dict(inputs or {})
        if positions is not None:
            extra["position_ids"] = positions
        with self._captured() as states, StayWide(self.model.dtype):
            out = self.model(input_ids=tokens, use_cache=False, **extra)
        aux = torch.stack([states[c] for c in range(len(self.layers) + 1)], dim=2)
        return WitnessOutput(out.logits, states[-1], aux)

    @contextmanager
    def _captured(self) -> Iterator[dict[int, Tensor]]:
        """What a forward pass leaves at each capture point, and at -1 what the final norm makes of the last."""
        states: dict[int, Tensor] = {}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states[0] = (args[0] if args else kwargs["hidden_states"]).clone()

        def leave(c: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                states[c] = (output[0] if isinstance(output, tuple) else output).clone()

            return hook

        hooks = [self.layers[0].register_forward_pre_hook(enter, with_kwargs=True)]
        hooks += [layer.register_forward_hook(leave(i + 1)) for i, layer in enumerate(self.layers)]
        hooks.append(self.decoder.norm.register_forward_hook(leave(-1)))
        try:
            yield states
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def generate(
        self,
        prompts: Tensor,
        num_tokens: int,
        eos_token_id: int | None = None,
        inputs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Greedy decoding with a dynamic cache by transformers' own loop; -1 after the end.

        prompts  [B, T]
        ->       [B, num_tokens]
        """
        settings = transformers.GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,
            use_cache=True,
            eos_token_id=eos_token_id,
            pad_token_id=0 if eos_token_id is None else eos_token_id,
        )
        text = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            generation_config=settings,
            **dict(inputs or {}),
        )
        new = text[:, prompts.shape[1] :]
        tokens = new.new_full((prompts.shape[0], num_tokens), -1)
        tokens[:, : new.shape[1]] = new
        if eos_token_id is not None:
            ended = (tokens == eos_token_id).long().cumsum(1)
            tokens[(ended - (tokens == eos_token_id).long()) > 0] = -1
        return tokens
