"""Bugs of trees: scores, parents, sight, depths, the walk, and the path that must be compacted."""

from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

CLAIMS = "suites/correctness/"
PATHS = f"{CLAIMS}test_trees.py::test_the_nodes_are_the_best_paths_breadth_first"
WALK = f"{CLAIMS}test_trees.py::test_the_walk_goes_down_while_a_child_says_what_the_target_says"
ALONE = f"{CLAIMS}test_trees.py::test_the_draft_knows_each_path_alone"
READS = f"{CLAIMS}test_trees.py::test_after_a_path_the_draft_reads_what_the_target_knew"
TEXTS = f"{CLAIMS}test_tree_texts.py::test_trees_leave_the_text_alone"
EVERY_WORD = f"{CLAIMS}test_tree_texts.py::test_a_tree_of_every_word_accepts_all_its_steps"
TWIN = f"{CLAIMS}test_tree_texts.py::test_the_twin_grows_the_same_trees"
REJECTED = f"{CLAIMS}test_tree_texts.py::test_what_was_rejected_is_never_read"
CAPTURED = f"{CLAIMS}test_tree_texts.py::test_a_cycle_of_trees_can_be_captured"
LAW = f"{CLAIMS}test_tree_sampling.py::test_the_law_of_the_text_is_the_targets"
LINE = f"{CLAIMS}test_ops_trees.py::test_a_node_reads_its_own_line"
MOVES = f"{CLAIMS}test_ops_trees.py::test_a_path_moves_to_the_front_and_nothing_else_moves"

PAGE, FAST, ATEN = "reference.trees", "optimized.trees", "optimized.ops.aten.Aten"


def scores_summed(right: Any) -> Any:
    return lambda known, beam, ids, chances: right(known, beam, ids, 1 + chances / beam.scores[..., None])


def parents_one_off(right: Any) -> Any:
    """Parents are counted among the candidates alone, as if there were no root before them."""

    def select(*asked: Any) -> Any:
        nodes = right(*asked)
        return nodes._replace(parents=(nodes.parents - 1).clamp(min=0))

    return select


def in_order_of_scores(_: Any) -> Any:
    """The best candidates as they come, best first."""

    def select(known: Any, root: Tensor, num_nodes: int) -> tuple[Tensor, Tensor]:
        chosen = known.scores.sort(stable=True, dim=-1, descending=True).indices[:, : num_nodes - 1]
        tokens = torch.cat([root[:, None], known.tokens.gather(1, chosen)], 1)
        parents = (chosen[:, None, :] <= known.parents.gather(1, chosen)[:, :, None]).sum(-1)
        return tokens, torch.cat([torch.zeros_like(parents[:, :1]), parents], 1)

    return select


def later_of_equals(right: Any) -> Any:
    """Of equal scores the higher number is the better: a child may stand without its parent."""
    return lambda scores, count: scores.shape[-1] - 1 - right(scores.flip(-1), count)


def lineage(words: Any = None, depths: Any = None) -> Any:
    """Equations (4) and (5) with one of them wrong."""

    def make(right: Any) -> Any:
        def found(parents: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
            depth, word = right(parents, num_steps)
            place = torch.arange(parents.shape[1]).expand_as(parents)
            return depth if depths is None else depths(depth, place), word if words is None else words(word, place)

        return found

    return make


def of_the_child_row(right: Any) -> Any:
    """A member goes on from the row of its own place instead of the row that it grew from."""
    return lambda x, rows: x if x.shape[:2] == rows.shape else right(x, rows)


def states_left_in_place(right: Any) -> Any:
    """States of the path stay where their nodes were."""
    return lambda x, rows: x[:, : rows.shape[1]] if x.shape[1] > rows.shape[1] else right(x, rows)


def rows_of_another_stride(right: Any) -> Any:
    """Paths of S + 1 nodes read as rows of one more."""

    def compact(self: Any, x: Tensor, first: Tensor, path: Tensor) -> None:
        batch, width = path.shape
        flat = torch.cat([path.flatten(), path.new_zeros(batch)])
        right(self, x, first, flat[torch.arange(batch)[:, None] * (width + 1) + torch.arange(width)].contiguous())

    return compact


def one_level_early(right: Any) -> Any:
    def walk(nodes: Any, own: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        path, accepted, _ = right(nodes, own, num_steps)
        accepted = accepted.clamp(max=num_steps - 1)
        return path, accepted, own.gather(1, path.gather(1, accepted[:, None]))[:, 0]

    return walk


def token_of_the_parents_row(right: Any) -> Any:
    def walk(nodes: Any, own: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
        path, accepted, _ = right(nodes, own, num_steps)
        return path, accepted, own.gather(1, path.gather(1, (accepted - 1).clamp(min=0)[:, None]))[:, 0]

    return walk


def bonus_counted_twice(right: Any) -> Any:
    def walk(*asked: Any) -> tuple[Tensor, Tensor]:
        path, accepted = right(*asked)
        return path, accepted + (accepted < asked[-1])

    return walk


def likely_is_enough(right: Any) -> Any:
    """A token of half the target's chances is taken outright: faster, and another distribution."""

    def draw(weights: Tensor, u: Tensor) -> Tensor:
        share, token = (weights / weights.sum(-1, keepdim=True)).max(-1)
        return torch.where(share >= 0.5, token, right(weights, u))

    return draw


def sight(right: Any) -> Any:
    """Every node sees the one beside it."""

    def words(self: Any, window: int | None = None) -> Tensor:
        return right(self, window) | (1 << (self.line[0] - 1).clamp(min=0))

    return words


def reads_the_number_of_nodes(right: Any) -> Any:
    def walk(tokens: Tensor, parents: Tensor, words: Tensor, own: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
        path, accepted = right(tokens, parents, words, own, num_steps)
        return path[:, : int(accepted.max()) + 1], accepted

    return walk


def bug(name: str, origin: str, at: str, make: Any, claim: str) -> Bug:
    return Bug(name, origin, at, make, claim)


BUGS = (
    bug("tree: scores summed", "SGLang list, M45", f"{PAGE}.grow", scores_summed, PATHS),
    bug("tree: parent one off", "SGLang list, M45", f"{PAGE}.select", parents_one_off, PATHS),
    bug("tree: a child before its parent", "SGLang 6.2, ties", f"{PAGE}.leading", later_of_equals, PATHS),
    bug(
        "tree: a node sees its sibling",
        "SGLang list, M46",
        f"{PAGE}.lineage",
        lineage(words=lambda word, place: word | (1 << (place - 1).clamp(min=0))),
        EVERY_WORD,
    ),
    bug(
        "tree: sight without the root",
        "SGLang list, M46",
        f"{PAGE}.lineage",
        lineage(words=lambda word, place: torch.where(place > 0, word & ~1, word)),
        TEXTS,
    ),
    bug(
        "tree: position by slot",
        "SGLang list, M46",
        f"{PAGE}.lineage",
        lineage(depths=lambda depth, place: place),
        TEXTS,
    ),
    bug("tree: state of the child's row", "SGLang list, M45", f"{PAGE}.pick", of_the_child_row, ALONE),
    bug(
        "tree: keys of the path left in place",
        "SGLang list, M49",
        "reference.ops.cache.Cache.compact",
        lambda _: lambda self, first, path: None,
        EVERY_WORD,
    ),
    bug("tree: states of the path left in place", "SGLang list, M49", f"{PAGE}.pick", states_left_in_place, READS),
    bug("tree: one level early", "SGLang list, M47", f"{PAGE}.walk", one_level_early, EVERY_WORD),
    bug("tree: token of the parent's row", "SGLang list, M48", f"{PAGE}.walk", token_of_the_parents_row, LAW),
    bug(
        "tree: draft levels stay behind",
        "SGLang list, M49",
        "reference.drafting.Recurrent.forget",
        lambda _: lambda self, lengths: None,
        READS,
    ),
    bug("twin, tree: indices not sorted", "SGLang list, M45", f"{FAST}.select", in_order_of_scores, PATHS),
    bug("twin, tree: state of the child's row", "SGLang list, M45", f"{FAST}.pick", of_the_child_row, ALONE),
    bug("twin, tree: states left in place", "SGLang list, M49", f"{FAST}.pick", states_left_in_place, READS),
    bug("twin, tree: bonus counted twice", "SGLang list, M50", f"{FAST}.walk", bonus_counted_twice, TEXTS),
    bug(
        "twin, tree: stride of another array",
        "SGLang 6.4: S + 1 and D",
        f"{ATEN}.compact",
        rows_of_another_stride,
        MOVES,
    ),
    bug(
        "twin, tree: keys left in place",
        "SGLang list, M49",
        f"{ATEN}.compact",
        lambda _: lambda self, x, first, path: None,
        EVERY_WORD,
    ),
    bug("twin, tree: a node sees its sibling", "SGLang list, M46", "optimized.ops.sight.Sight.words", sight, LINE),
    bug(
        "twin, tree: windows count slots",
        "SGLang list, M46",
        "optimized.ops.sight.Sight.words",
        lambda right: lambda self, window=None: right(self),
        LINE,
    ),
    bug(
        "twin, tree: threshold below one",
        "SGLang 6.3: threshold_single",
        "optimized.tree_cycle.draw",
        likely_is_enough,
        LAW,
    ),
    bug("twin, tree: the host counts the path", "SGLang 6.7", f"{FAST}.walk", reads_the_number_of_nodes, CAPTURED),
)
