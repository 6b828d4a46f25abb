"""The experts of one layer: small feed-forward blocks that stand in two stacked weights, each cut on its width.

Every rank holds a run of the intermediate features of every expert, so that ranks have equal work whichever experts
a token chooses. Routers are replicated: ranks choose alike, and only the sum over experts is added over ranks.
Letters: reference/README.md.
"""

from torch import Tensor

from optimized.parallel import Part, Placement, equal_run, sum_in_rank_order


class Experts(Part):
    """Gate, up and down projections of all experts of a layer: gate_up [E, 2I/W, H], down [E, H, I/W].

    prefix  of canonical names: `{prefix}{expert}.gate_proj.weight` and so on
    """

    def __init__(
        self, prefix: str, experts: int, hidden: int, intermediate: int, at: Placement, act: str = "silu"
    ) -> None:
        super().__init__(at)
        run = equal_run(intermediate, at.group.rank, at.group.size, "intermediate features of an expert")
        width, self.act = run.stop - run.start, act
        self.gate_up, self.down = self.new(experts, 2 * width, hidden), self.new(experts, hidden, width)
        for number, (rows, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            name = f"{prefix}{number}."
            self.place(f"{name}gate_proj.weight", rows[:width], (intermediate, hidden), run)
            self.place(f"{name}up_proj.weight", rows[width:], (intermediate, hidden), run)
            self.place(f"{name}down_proj.weight", down, (hidden, intermediate), slice(None), run)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, on every rank.

        x        [M, H]
        ids      [M, P]
        weights  [M, P]
        ->       [M, H]
        """
        mixed = self.ops.experts(x, ids, weights, self.gate_up, self.down, self.act)
        return mixed if self.group.size == 1 else sum_in_rank_order(self.group, mixed)
