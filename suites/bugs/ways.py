"""Bugs of the ways of drafting: what is read, where it stands, and which way a name means."""

import copy
from typing import Any

import torch
from torch import Tensor

from harness.checkpoints import CheckpointError
from harness.planting import Bug

ALONE = "suites/correctness/test_standalone.py"
SELF = f"{ALONE}::test_as_a_draft_of_itself_it_is_always_right"
FREE = f"{ALONE}::test_what_the_target_thinks_is_nothing_to_it"
MAPPED = f"{ALONE}::test_only_ids_of_the_map_are_proposed"
UNROLLED = f"{ALONE}::test_its_first_step_has_read_the_whole_text"
NAMES = "suites/correctness/test_algorithms.py"
REFUSED = f"{NAMES}::test_an_eagle3_draft_is_not_started_as_anything_else"
FOLDERS = f"{NAMES}::test_a_folder_with_a_next_token_module_is_asked_for_either"
FEEDBACK = "suites/correctness/test_reads.py::test_a_later_step_reads_its_own_feedback_one_position_on"
JOINS = "suites/correctness/test_joins.py"
SHARED, RANKS = f"{JOINS}::test_the_twin_shares_what_the_reference_shares", f"{JOINS}::test_ranks_share_their_own_rows"
RAW = f"{JOINS}::test_the_draft_reads_raw_rows"
TWIN_DRAFT = "optimized.drafts.eagle3.Eagle3Draft"
WAYS, TWIN = "reference.drafting", "optimized.drafting"


def root_in_the_last_slot(right: Any) -> Any:
    """The root where the token before it stands."""

    def start(self: Any, out: Any, tokens: Tensor, following: Tensor, positions: Tensor, last: Tensor) -> Any:
        return right(self, out, tokens, following, (positions - 1).clamp(min=0), last)

    return start


def next_shifted(by: int) -> Any:
    """Later steps some positions off."""
    return lambda right: lambda self, token, feedback, lengths, k: right(self, token, feedback, lengths + by, k)


def twin_next_shifted(by: int) -> Any:
    return lambda right: lambda self, token, feedback, k, num_slots: right(self, token, feedback, k + by, num_slots)


def stands_still(right: Any) -> Any:
    """Every step at the position of the second."""
    return lambda self, token, feedback, lengths, k: right(self, token, feedback, lengths, 2)


def settled_one_early(right: Any) -> Any:
    """The twin's settled tokens at the positions of the states before them."""

    def start(self: Any, num_slots: int | None) -> Any:
        kept = self.state.settled_positions
        self.state.settled_positions = lambda: torch.where(kept() > 0, kept() - 1, kept())
        try:
            return right(self, num_slots)
        finally:
            del self.state.settled_positions

    return start


def same_width_only(right: Any) -> Any:
    """A draft that drafts alone held to its target's width, as engines do whose states share a buffer."""

    def check(checkpoint: Any, config: Any, target: Any) -> None:
        right(checkpoint, config, target)
        if config.hidden != target.config.hidden:
            raise CheckpointError(f"{checkpoint.path}: {config.hidden} is not {target.config.hidden}")

    return check


def any_name(right: Any) -> Any:
    """EAGLE means EAGLE-3."""
    return lambda algorithm, pair: right("EAGLE3" if pair == "eagle3" else algorithm, pair)


def always_the_module(right: Any) -> Any:
    return lambda checkpoint, kind, algorithm=None: right(checkpoint, kind)


def scaled_rows(right: Any) -> Any:
    """The module of a target that scales its embeddings, call and all."""

    def share(checkpoint: Any, target: Any, modules: Any, name: str, *rest: Any) -> None:
        right(checkpoint, target, modules, name, *rest)
        if name.startswith("embed_tokens") and isinstance(modules[0], torch.nn.Module):
            table = modules[0].embed_tokens.weight
            modules[0].embed_tokens = torch.nn.Embedding.from_pretrained(table * table.shape[1] ** 0.5)

    return share


def capped_head(right: Any) -> Any:
    def share(self: Any, target: Any) -> None:
        right(self, target)
        self.lm_head = target.lm_head

    return share


def rows_of_the_first_rank(right: Any) -> Any:
    """Every rank's table answers for the rows that the first rank holds."""

    def share(self: Any, target: Any) -> None:
        right(self, target)
        self.embed_tokens = copy.copy(self.embed_tokens)
        self.embed_tokens.first = 0

    return share


BUGS = (
    Bug(
        "standalone: the root one position early",
        "vLLM #46488",
        f"{WAYS}.Standalone.start",
        root_in_the_last_slot,
        SELF,
    ),
    Bug("standalone: later steps one late", "SGLang list, M23", f"{WAYS}.Standalone.next", next_shifted(1), SELF),
    Bug(
        "twin standalone: later steps where EAGLE's are",
        "SGLang list, M23",
        f"{TWIN}.Standalone.next",
        twin_next_shifted(-1),
        SELF,
    ),
    Bug(
        "twin standalone: settled tokens one early",
        "SGLang list, M23",
        f"{TWIN}.Standalone.start",
        settled_one_early,
        SELF,
    ),
    Bug(
        "standalone: token map applied twice",
        "SGLang list, token map",
        "reference.drafts.standalone.StandaloneDraft.to_target",
        lambda right: lambda self, ids: right(self, right(self, ids).clamp(max=len(self.token_map) - 1)),
        MAPPED,
    ),
    Bug(
        "standalone: the first step reads one token less",
        "SGLang list, M21",
        "reference.drafts.standalone.StandaloneDraft.unroll",
        lambda right: lambda self, tokens, hidden, num_steps: right(self, tokens.roll(1, 1), hidden, num_steps),
        UNROLLED,
    ),
    Bug(
        "standalone: widths must be equal",
        "SGLang STANDALONE",
        "suites.joining.check_vocabulary",
        same_width_only,
        FREE,
    ),
    Bug("EAGLE taken for EAGLE-3", "SGLang EAGLE flag", "suites.catalog.resolve", any_name, REFUSED),
    Bug("STANDALONE ignored", "SGLang #26468", "suites.catalog.find_pair", always_the_module, FOLDERS),
    Bug(
        "draft position stands still",
        "SGLang frozen KV against EAGLE",
        f"{WAYS}.Recurrent.next",
        stands_still,
        FEEDBACK,
    ),
    Bug("Gemma's scale handed over with the table", "SGLang #23976", "suites.joining.share", scaled_rows, RAW),
    Bug("Gemma's softcap handed over with the head", "SGLang 4.1", f"{TWIN_DRAFT}.share_head", capped_head, SHARED),
    Bug(
        "every rank's rows taken for the first rank's",
        "SGLang #23976",
        f"{TWIN_DRAFT}.share_embedding",
        rows_of_the_first_rank,
        RANKS,
    ),
    Bug(
        "files beside the weights left out in silence",
        "vLLM mask_embedding.pt",
        "suites.joining.refuse_side_files",
        lambda right: lambda checkpoint: None,
        "suites/correctness/test_bad_input.py::test_a_pickle_that_holds_a_parameter_is_named",
    ),
)
