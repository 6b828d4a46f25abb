"""Bugs of finding out what a draft was trained with: verdicts that nothing supports, edits that do something else."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.planting import Bug

MADE = "suites/correctness/test_identify_made.py"
TRAINED = "suites/correctness/test_identify.py"
COMMAND = "suites/selftest/test_identify_command.py"
FOUND = f"{MADE}::test_the_truth_is_found_and_what_costs_nothing_has_no_effect"
SELDOM = f"{MADE}::test_a_family_of_readings_is_accused_as_seldom_as_promised"
FORMULA = f"{MADE}::test_a_loss_is_its_formula_whatever_stands_beside_the_text"
EDITS = f"{MADE}::test_an_edit_is_the_draft_whose_config_says_so"
TURNED = f"{MADE}::test_neighbours_are_turned_as_the_equation_turns_them"
MAPS = f"{MADE}::test_a_map_is_read_as_it_is_called"
KINDEST = f"{MADE}::test_the_kindest_reading_of_a_claim_decides"
LIES = f"{TRAINED}::test_a_copy_that_lies_is_named_and_an_honest_one_is_not"
POSTNORM, ALONE = f"{LIES}[llama-eagle3-postnorm]", f"{LIES}[llama-standalone]"
COSTS = f"{COMMAND}::test_a_lie_ends_an_audit_and_its_cost_is_told"


def swapped(paired: Any) -> Any:
    """What was found minus the other reading."""

    def wrong(other: Tensor, stated: Tensor) -> Any:
        return paired(stated[:, : other.shape[1]], other)

    return wrong


def unpaired(paired: Any) -> Any:
    """Two samples that have nothing to do with each other."""

    def wrong(other: Tensor, stated: Tensor) -> Any:
        # the same texts in another order: the same means, and no pair of them
        order = torch.randperm(other.shape[1], generator=torch.Generator().manual_seed(0))
        return paired(other, stated[:, : other.shape[1]][:, order])

    return wrong


def backwards(with_points: Any) -> Any:
    """A shift applied to the ids and not to the points, or to the wrong side: one more where one less was meant."""
    return lambda draft, points: with_points(
        draft, [2 * now - point for now, point in zip(draft.capture_points, points, strict=True)]
    )


def absolute(mapped_ids: Any) -> Any:
    """Whatever the map is called, it is read as target ids."""
    return lambda draft, value: mapped_ids(draft, "absolute")


def last_wins(with_map: Any) -> Any:
    """Of draft ids that mean one token, the last has it all."""

    def wrong(draft: Any, ids: Tensor) -> Any:
        found = with_map(draft, ids)
        vocab = draft.facts.config.vocab

        def spread(logits: Tensor) -> Tensor:
            wide = logits.new_full((*logits.shape[:2], vocab), float("-inf"))
            wide[:, :, ids] = logits
            return wide

        found.module.spread = spread
        return found

    return wrong


def misaligned(loss: Any) -> Any:
    """A draft held to the token before the one that it proposes."""
    return lambda draft, logits, meant, lengths, k: loss(draft, logits, meant.roll(1, 1), lengths, k)


def padded(loss: Any) -> Any:
    """Columns behind the end of a text counted with it."""
    return lambda draft, logits, meant, lengths, k: loss(
        draft, logits, meant, torch.full_like(lengths, meant.shape[1]), k
    )


def same_module(cloned: Any) -> Any:
    """A copy that is the original."""
    return lambda module: module


def harshest(judge: Any) -> Any:
    """Of two readings of a file, the worse one accuses it."""

    def wrong(fact: str, claimed: Any, found: Any, contrasts: Any) -> Any:
        known = [value for value in claimed if value in contrasts]
        worst = max(known, key=lambda value: contrasts[value].nats, default=None)
        return judge(fact, claimed if worst is None else (worst,), found, contrasts)

    return wrong


def leaking(neutral: Any) -> Any:
    """The base of a rope that the config claims, kept in what the search begins with."""

    def wrong(checkpoint: Any, pair: Any, num_layers: int) -> Any:
        bare = neutral(checkpoint, pair, num_layers)
        theta = checkpoint.config.get("rope_theta", 10_000.0)
        return replace(bare, config={**bare.config, "rope_theta": theta})

    return wrong


def unread(points: Any) -> Any:
    """Layer ids that nobody holds to what was found."""
    return lambda *arguments: ()


def same_draft(opened: Any) -> Any:
    """Every engine runs what was meant."""
    return lambda reading, checkpoint, target: opened(
        replace(reading, points=tuple(point + (reading.points[0] == 1) for point in reading.points)), checkpoint, target
    )


IDENTIFY, CANDIDATES, LOSSES = "suites.audit.identify", "suites.audit.candidates", "suites.audit.losses"
BUGS: tuple[Bug, ...] = (
    Bug("audit-sign", "difference taken the wrong way round", f"{IDENTIFY}.paired", swapped, FOUND),
    Bug("audit-unpaired", "variance between texts, not within them", f"{IDENTIFY}.paired", unpaired, FOUND),
    Bug("audit-no-correction", "thirty readings at one in twenty each", "suites.audit.contrasts.holm",
        lambda right: lambda p: list(p), SELDOM),
    Bug("audit-shift-backwards", "layer ids against capture points", f"{CANDIDATES}.with_points", backwards, EDITS),
    Bug("audit-map-absolute", "d2t read as target ids", f"{CANDIDATES}.mapped_ids", absolute, MAPS),
    Bug("audit-map-last-wins", "two draft ids for one token", "suites.audit.variants.with_map", last_wins, MAPS),
    Bug("audit-loss-misaligned", "off by one in the token that is proposed", f"{LOSSES}._loss", misaligned, FORMULA),
    Bug("audit-loss-padding", "padding counted as text", f"{LOSSES}._loss", padded, FORMULA),
    Bug("audit-edit-in-place", "a copy that shares what it changes", "suites.audit.variants.cloned", same_module,
        TURNED),
    Bug("audit-harshest-claim", "an ambiguous file accused", "suites.audit.claims._judge", harshest, KINDEST),
    Bug("audit-hint-kept", "a claim among its own evidence", "suites.audit.claims.neutral", leaking, ALONE),
    Bug("audit-ids-unread", "the claim of the ids left out", "suites.audit.claims._points", unread, POSTNORM),
    Bug("audit-cost-of-what-was-meant", "a wrong reading that is never run", "suites.audit.costs.opened", same_draft,
        COSTS),
)  # fmt: skip
