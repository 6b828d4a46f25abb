"""What a loader did with the parameters of a model, and with the tensors of a file: measured, for any engine in torch.

Runs inside an engine's environment, beside its runner. Memory that torch hands out is NaN under deterministic
algorithms, so a parameter that was never given a value shows it. Between building and loading every parameter is
blanked; what is still blank afterwards was left unwritten, and is given back what it was born with.
"""

import math
from pathlib import Path

import torch
from safetensors import safe_open

STACKED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""fused parameters as engines name them -> what checkpoints call their parts"""


class Ledger:
    """What a loader did with the parameters of a model and with the tensors of a file."""

    def __init__(self):
        self.unwritten, self.unread = {}, []

    def watch(self, load):
        """A loader's `load_weights` that keeps this account."""

        def watched(loader, model, model_config):
            state = {}
            for name, value in model.state_dict(keep_vars=True).items():
                state.setdefault(value.data_ptr(), (name, value))
            born = {name: value.detach().clone() for name, value in state.values()}
            for _, value in state.values():
                value.data.fill_(blank(value))
            load(loader, model, model_config)
            try:
                self.close(model, model_config, state, born)
            except Exception as error:
                # ours, not the engine's: nobody may take it for a refusal
                raise SystemExit(f"the account of {model_config.model} failed: {error!r}") from error

        return watched

    def close(self, model, model_config, state, born):
        """What is blank, and what is nowhere."""
        after = {name: value.detach() for name, value in model.state_dict(keep_vars=True).items()}
        self.unread, self.unwritten = unread(Path(model_config.model), after), {}
        for name, value in state.values():
            self.note(model, name, value.data, born[name])

    def note(self, model, name, value, born):
        """Tell each published part of a parameter that is blank, and give it back what it was born with."""
        module = model.get_submodule(name.rpartition(".")[0])
        for part, rows in parts(module, name, len(value) if value.dim() else 1):
            cut, before = (x[rows] if x.dim() else x for x in (value, born))
            lost = is_blank(cut)
            if bool(lost.any()):
                self.unwritten[part] = told(before)
                cut.copy_(torch.where(lost, before, cut))


def parts(module, name, size):
    """(published name, rows) of a parameter; one for the whole where nothing is fused."""
    owner = name.rsplit(".", 2)[-2] if name.count(".") else ""
    if owner not in STACKED:
        return [(name, slice(0, size))]
    ends = [0]
    for width in module.output_sizes:
        ends.append(ends[-1] + width)
    return [
        (name.replace(f".{owner}.", f".{part}."), slice(ends[i], ends[i + 1]))
        for i, part in enumerate(STACKED[owner])
    ]  # fmt: skip


def blank(value):
    """What no checkpoint holds."""
    if value.dtype == torch.bool:
        return True
    return math.nan if value.is_floating_point() else torch.iinfo(value.dtype).min


def is_blank(value):
    """Which elements nobody has written."""
    return value.isnan() if value.is_floating_point() else value == blank(value)


def told(born):
    """What stands where nothing was written."""
    if bool(is_blank(born).any()):
        return "uninitialised memory"
    for what, number in (("ones", 1), ("zeros", 0)):
        if bool((born == number).all()):
            return what
    return "what its constructor computes"


def unread(folder, state):
    """Tensors of a file whose bytes are in no parameter."""
    held = {}
    for value in state.values():
        held.setdefault((value.dtype, value.shape[1:]), []).append(value.contiguous().numpy().tobytes())
    lost = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                tensor = opened.get_tensor(name)
                found = any(
                    tensor.shape[1:] == shape and any(tensor.to(dtype).contiguous().numpy().tobytes() in x for x in xs)
                    for (dtype, shape), xs in held.items()
                )  # fmt: skip
                lost += [] if found else [name]
    return sorted(lost)
