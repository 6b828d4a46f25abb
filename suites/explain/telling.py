"""A dump of our own: what the reference, or a twin, makes of a text.

The reference tells of every draft by its teacher-forced unroll. A twin holds one key a slot and cannot unroll: every
column of the text becomes a sequence of its own, which has read up to there and goes on from its own feedback, as an
engine serves it. That is told for EAGLE-3 drafts; other drafts of a twin are left out.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.outputs import TargetOutput
from suites.explain.dump import Dump
from suites.explain.ladder import drafted, mapped
from suites.explain.states import States, walk
from suites.opened import OpenDraft, OpenTarget

NUM_STEPS = 3
SERVED = ("eagle3", "eagle3_mla")
"""pairs whose twin's draft can be told of"""


@torch.no_grad()
def tell(
    target: OpenTarget,
    draft: OpenDraft | None,
    tokens: Tensor,
    num_steps: int = NUM_STEPS,
    given: Mapping[int, Tensor] | None = None,
) -> Dump:
    """Everything that one side makes of a text.

    tokens  [B, T]
    given   capture point -> [B, T, H], read there whatever arrived
    """
    made, side = walk(target, tokens, None, given, draft.capture_points if draft else ()), target.side
    told = dict(made)
    if draft is not None and side.name == "reference":
        told |= drafted(Dump(tokens, made), draft, made, num_steps)
    elif draft is not None and draft.pair.name in SERVED:
        told |= served(draft, tokens, made, num_steps)
    return Dump(tokens, told, None, side.dtype, f"draftproof {side.name} {target.pair.name}")


def served(draft: OpenDraft, tokens: Tensor, made: States, num_steps: int) -> States:
    """fused, logits.k, feedback.k and map of a twin's draft.

    tokens  [B, T]
    """
    module, (batch, width), device = draft.module, tokens.shape, draft.side.device
    aux = made.get("aux", made["final"].new_zeros(batch, width, 0, 1))
    hidden = module.read(TargetOutput(made["target_logits"], made["final"], aux))
    column = torch.arange(width, device=device).repeat(batch)  # [B*T]
    place = torch.arange(width, device=device)
    positions = torch.where(place <= column[:, None], place, -1)  # [B*T, T]
    ahead = torch.nn.functional.pad(tokens.to(device), (0, num_steps + 1)).repeat_interleave(width, 0)
    cache, rows = module.new_cache(batch * width, width + num_steps), torch.arange(batch * width, device=device)
    step = module(ahead[:, 1 : width + 1].contiguous(), hidden.repeat_interleave(width, 0), positions, cache)
    logits, feedback = step.logits[rows, column], step.feedback[rows, column]
    told: States = {"fused": hidden, **mapped(draft)}
    for k in range(1, num_steps + 1):
        if k > 1:
            following = ahead.gather(1, (column + k)[:, None])
            step = module(following, feedback[:, None], (column + k - 1)[:, None], cache)
            logits, feedback = step.logits[:, 0], step.feedback[:, 0]
        unknown = (column + k >= width)[:, None]
        told[f"logits.{k}"] = logits.masked_fill(unknown, float("nan")).unflatten(0, (batch, width))
        told[f"feedback.{k}"] = feedback.masked_fill(unknown, float("nan")).unflatten(0, (batch, width))
    return told
