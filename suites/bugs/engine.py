"""Bugs of what is said about an engine: rows that its own classes contradict, and a comparison that looks away."""

from typing import Any

from harness.planting import Bug
from suites.bugs.dialects import rows
from suites.formats.rows import NEEDED, NO_Q_LORA, ONES, Dialect, Row

ENGINE = "suites/correctness/test_engine.py"
FORETELLS = f"{ENGINE}::test_the_audit_foretells_what_vllm_did"


def without(fact: str, key: str) -> Any:
    """A dialect that lacks the rows of a fact under a key."""
    return rows(lambda row: None if (row.fact, row.key) == (fact, key) else row)


def biased_latents(right: Dialect) -> Dialect:
    """Biases of the MLP read under latent attention too, as under Llama's body."""
    gone = [row for row in right.rows if row.fact == "mlp_bias" and row.where == "latent attention"]
    return right._replace(rows=tuple(row for row in right.rows if row not in gone))


def strict_norms(row: Row) -> Row:
    return row._replace(means="refused") if row.fact == "missing" and row.means == ONES else row


def blind(came_true: Any) -> Any:
    """What was dropped is nobody's business."""
    return lambda said, did: came_true({k: v for k, v in said.items() if k != "dropped"}, did)


def bug(name: str, origin: str, make: Any, case: str) -> Bug:
    return Bug(f"engine-{name}", origin, "suites.formats.reading.DIALECTS['vllm-v1']", make, f"{FORETELLS}[{case}]")


BUGS = (
    bug("bias-means-fc-alone", "vLLM 0.33.0 llama.py:266, run", without("o_bias", "bias"), "bias of fc"),
    bug(
        "layout-by-its-type",
        "vLLM 0.33.0 config.py:364, run",
        rows(lambda row: None if row.fact == "layout" and row.means == NEEDED else row),
        "speculators' layout without its own key",
    ),
    bug(
        "latents-need-no-q-lora",
        "vLLM 0.33.0 deepseek_eagle3.py:265, run",
        rows(lambda row: None if row.where == NO_Q_LORA else row),
        "latent attention without q-LoRA",
    ),
    bug("latents-with-biases", "vLLM 0.33.0 DeepseekV2MLP, run", biased_latents, "latent attention, biases"),
    bug("norms-are-checked", "vLLM 1.1.5: load_weights returns None", rows(strict_norms), "final norm missing"),
    Bug(
        "engine-dropped-tensors-uncounted",
        "AutoWeightsLoader ignores every unexpected bias",
        "suites.correctness.test_engine.came_true",
        blind,
        f"{ENGINE}::test_an_engine_that_did_otherwise_is_told[dropped]",
    ),
)
