"""The experts of one layer: small feed-forward blocks that stand in two stacked weights, each cut on its width.

Every rank holds a run of the intermediate features of every expert, so that ranks have equal work whichever experts
a token chooses. Routers are replicated: ranks choose alike, and only the sum over experts is added over ranks. Shared
experts, one block as wide as all of them in a checkpoint, stand behind the others as so many experts of equal width:
a sum over their features is the same however it is parted.
Letters: reference/README.md.
"""

from torch import Tensor

from optimized.parallel import Part, Placement, equal_run, sum_in_rank_order


class Experts(Part):
    """Gate, up and down projections of all experts of a layer: gate_up [E, 2I/W, H], down [E, H, I/W].

    prefix         of canonical names: `{prefix}{expert}.gate_proj.weight` and so on
    shared         how many shared experts there are; they are the last ones
    shared_prefix  of their names: `{shared_prefix}gate_proj.weight` and so on
    """

    def __init__(
        self,
        prefix: str,
        experts: int,
        hidden: int,
        intermediate: int,
        at: Placement,
        act: str = "silu",
        shared: int = 0,
        shared_prefix: str = "",
    ) -> None:
        super().__init__(at)
        run = equal_run(intermediate, at.group.rank, at.group.size, "intermediate features of an expert")
        self.width, self.act, total = run.stop - run.start, act, experts + shared
        self.gate_up, self.down = self.new(total, 2 * self.width, hidden), self.new(total, hidden, self.width)
        for number in range(experts):
            name, rows, down = f"{prefix}{number}.", self.gate_up[number], self.down[number]
            self.place(f"{name}gate_proj.weight", rows[: self.width], (intermediate, hidden), run)
            self.place(f"{name}up_proj.weight", rows[self.width :], (intermediate, hidden), run)
            self.place(f"{name}down_proj.weight", down, (hidden, intermediate), slice(None), run)
        # views by expert, feature and feature of the stream
        gate, up = self.gate_up[experts:].split(self.width, 1)
        self.parted = dict.fromkeys([f"{shared_prefix}{n}_proj.weight" for n in ("gate", "up", "down") if shared])
        for name, view in zip(self.parted, (gate, up, self.down[experts:].transpose(1, 2)), strict=False):
            held = slice(run.start * shared, run.stop * shared)
            shape, runs = ((intermediate * shared, hidden), (held,))
            if name.endswith("down_proj.weight"):
                shape, runs = shape[::-1], (slice(None), held)
            self.place(name, view, shape, *runs)

    def load(self, name: str, full: Tensor) -> None:
        """Part a shared projection into experts."""
        if name not in self.parted:
            return super().load(name, full)
        shard = self.shard(name, full)
        rows = shard.T if name.endswith("down_proj.weight") else shard
        self.pieces[name].into.copy_(rows.unflatten(0, (-1, self.width)))
        self.written.add(name)

    def unpack(self) -> dict[str, Tensor]:
        """This rank's shard of every canonical tensor, shared projections in one again."""
        shards = super().unpack()
        for name in self.parted:
            rows = shards[name].flatten(0, 1)
            shards[name] = rows.T.contiguous() if name.endswith("down_proj.weight") else rows
        return shards

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts, on every rank.

        x        [M, H]
        ids      [M, P]
        weights  [M, P]
        ->       [M, H]
        """
        mixed = self.ops.experts(x, ids, weights, self.gate_up, self.down, self.act)
        return mixed if self.group.size == 1 else sum_in_rank_order(self.group, mixed)
