"""How many experts a step really touches: routing is all but uniform with random weights, and not with trained ones."""

from optimized import cycle
from suites.benchmarks.calls import noted
from suites.benchmarks.steady import Steady

ROUTERS = ("route_softmax", "route_grouped")


def touched(steady: Steady) -> list[int]:
    """Distinct experts of one step of the target, a number for each layer that has experts."""
    text = steady.built.text
    steady.begin()
    with noted(text.at.ops, ROUTERS) as calls:
        cycle.verify(steady.session.models, steady.session.state)
    # numbers from E on are shared experts, which nobody chooses
    return [len(ids[ids < text.c.experts].unique()) for ids, _ in (call.result for call in calls)]
