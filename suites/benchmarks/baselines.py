"""What others do with the same shape: transformers' loops, and our own reference, on random weights of the same size.

    dynamic cache      `generate` as it comes
    static cache       the same with a static cache, which transformers compiles on CUDA
    assisted           `generate` with an assistant of its own; Gemma 4 alone has one, and one sequence alone may use it
    eager, compiled    the equations of `reference/`, a step at a time; they share the twin's weights

An arm that this machine cannot run, or that has no room, says so and is left out; it never ends a measurement.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from harness import timing, witness
from suites.benchmarks import roofline
from suites.benchmarks.shapes import Built
from suites.shells import without_memory

ROOM = 100e9
"""bytes that may lie on the device, the twin's among them"""
NUM_TOKENS = 12
"""of a visit"""
ATTENTION = "sdpa"
ASSISTANT = "gemma4_assistant"


Model = Callable[[], Any]
"""gives transformers' model of the shape, which is made when it is first asked for"""


class Arm(NamedTuple):
    """One baseline, ready to take turns."""

    impl: str
    form: str
    visit: timing.Call
    """seconds of each token that it says"""


class Stamps:
    """What transformers' `generate` tells while it writes: once the prompt, then every token or run of tokens."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, value: Tensor) -> None:
        self.at.append(timing.now())

    def end(self) -> None:
        """Part of a streamer's face."""

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds between what was said; the first word comes from the prompt's own pass."""
        return tuple(then - now for now, then in pairwise(self.at[1:]))


def arms(built: Built, device: str, names: Sequence[str]) -> dict[str, Arm | str]:
    """These baselines by name, or why one is left out; those of transformers share one model."""
    found: dict[str, Arm | str] = {}
    model = cache(partial(outside, json.loads(built.shape.target), device, built.text.at.dtype))
    for name in names:
        make = MAKERS[name]
        try:
            arm = make(built, device, model)
            if not isinstance(arm, str):
                arm.visit()
            found[name] = arm
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, ImportError) as error:
            # another project's code at a size it may never have seen: its failure is a fact about it
            found[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return found


def outside(config: Mapping[str, Any], device: str, dtype: torch.dtype) -> Any:
    """A model of transformers with the random weights that it starts from, made where it will run."""
    facts = dict(config)
    parsed = transformers.AutoConfig.for_model(facts.pop("model_type"), **facts)
    with torch.device(device):
        model = witness.class_of(parsed)._from_config(parsed, dtype=dtype, attn_implementation=ATTENTION)
    return model.eval().requires_grad_(False)


def generating(built: Built, device: str, model_of: Model, form: str, **settings: Any) -> Arm | str:
    """`generate` over a prompt as long as the shape's, one sequence."""
    shape, dtype = built.shape, built.text.at.dtype
    # a twin of shapes alone takes no room
    models = 1 if built.text.at.device.type == "meta" else 2
    needed = roofline.resident(built, 1, shape.length) * models
    if needed > ROOM:
        return f"both models need {needed / 1e9:.0f} GB, {ROOM / 1e9:.0f} GB are allowed"
    model = model_of()
    if settings.pop("assisted", False):
        settings["assistant_model"] = outside(json.loads(shape.draft), device, dtype)
        settings["assistant_model"].generation_config.num_assistant_tokens = 3
        settings["assistant_model"].generation_config.num_assistant_tokens_schedule = "constant"
    prompt = torch.randint(0, 512, (1, shape.length), device=device, generator=torch.Generator(device).manual_seed(0))
    how = transformers.GenerationConfig(
        max_new_tokens=NUM_TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0,
        cache_implementation=settings.pop("cache", None),
    )  # fmt: skip

    def visit() -> tuple[float, ...]:
        stamps = Stamps()
        with torch.no_grad():
            mask = torch.ones_like(prompt)
            model.generate(prompt, attention_mask=mask, generation_config=how, streamer=stamps, **settings)
        return stamps.steps

    return Arm("transformers", form, visit)


def dynamic(built: Built, device: str, model: Model) -> Arm | str:
    """As it comes."""
    return generating(built, device, model, f"dynamic cache, {ATTENTION}")


def static(built: Built, device: str, model: Model) -> Arm | str:
    """Compiled by transformers itself on CUDA, eager elsewhere."""
    form = f"static cache, {'compiled' if device == 'cuda' else 'eager'}"
    return generating(built, device, model, form, cache="static")


def assisted(built: Built, device: str, model: Model) -> Arm | str:
    """With transformers' own assistant; random weights keep no draft, so a word is a cycle."""
    if built.shape.pairs[1].name != ASSISTANT:
        return "transformers has no assistant of this kind"
    return generating(built, device, model, "assisted", assisted=True)


def eager(built: Built, device: str, model: Model) -> Arm | str:
    """The reference as it reads."""
    return Arm("reference", "eager", Stepped(built, device, lambda step: step).visit)


def compiled(built: Built, device: str, model: Model) -> Arm | str:
    """The reference under torch.compile; without a GPU its graphs are traced and run as they are."""
    if getattr(built.text.c, "experts", 0):
        return "its loop over experts is compiled anew for every choice of experts"
    backend = "inductor" if device == "cuda" else "eager"
    return Arm("reference", "compiled", Stepped(built, device, lambda step: torch.compile(step, backend=backend)).visit)


class Stepped:
    """The reference in mid-text, one token after another."""

    def __init__(self, built: Built, device: str, make: Callable[[Any], Any]) -> None:
        self.module, self.length = shared(built), built.shape.length
        self.forward, self.device = make(self.module.forward), device
        self.cache = self.module.new_cache(1, self.length + NUM_TOKENS)
        self.begun = torch.tensor([self.length], device=device)
        with torch.no_grad():
            generator = torch.Generator(device).manual_seed(0)
            prompt = torch.randint(0, 512, (1, self.length), device=device, generator=generator)
            self.root = self.module(prompt, cache=self.cache).logits[:, -1:].argmax(-1)
        self.token, self.position = self.root, self.begun[None]

    @torch.no_grad()
    def step(self) -> None:
        """The next token."""
        out = self.forward(self.token, self.position, cache=self.cache)
        self.token, self.position = out.logits.argmax(-1), self.position + 1

    def visit(self) -> tuple[float, ...]:
        self.cache.roll_back(self.begun)
        self.token, self.position = self.root, self.begun[None]
        return timing.time_calls(self.step, NUM_TOKENS, self.device)


def shared(built: Built) -> Any:
    """The reference of a shape's text over the twin's own numbers, without a copy where the layout allows."""
    pair, config = built.shape.pairs[0], built.shape.configs[0]
    with without_memory():
        module = pair.reference(config)
    module = getattr(module, "language_model", module)
    views: dict[str, Tensor] = {}
    for part in built.text.parts:
        packed = [piece.into.shape[1:] != piece.shape[1:] for piece in part.pieces.values()]
        whole = part.unpack() if any(packed) else {}
        views |= {name: whole.get(name, piece.into[: piece.shape[0]]) for name, piece in part.pieces.items()}
    _, unexpected = module.load_state_dict(views, strict=False, assign=True)
    if unexpected:
        raise KeyError(f"the reference has no {unexpected[0]}")
    module.tie()
    return module.eval().requires_grad_(False)


ALONE = ("transformers, dynamic", "transformers, static", "transformers, assisted")
"""those that need no twin"""
LOOPS = ("transformers, dynamic", "transformers, assisted", "reference")
"""those that compile nothing"""
MAKERS: dict[str, Callable[[Built, str, Model], Arm | str]] = {
    "transformers, dynamic": dynamic,
    "transformers, static": static,
    "transformers, assisted": assisted,
    "reference": eager,
    "reference, compiled": compiled,
}
