"""How each engine's words become ours: data.

Ours, over the verify steps of all prompts, of which one drafts up to K tokens and accepts a of them:

    acceptance length     mean of a + 1, the target's own token included
    acceptance rate       sum of a / (K * steps)
    rate of position i    share of the steps with a >= i

Both engines count the last step of an answer in full, with drafts that the end of the text or the limit cut off. The
reference is counted in the same way when the two are held together.
"""

from typing import NamedTuple


class Definition(NamedTuple):
    """One number that an engine gives."""

    engine: str
    theirs: str
    means: str
    ours: str
    source: str


VLLM, SGLANG = "vllm", "sglang"
_COUNTERS = "vLLM 0.33.0 vllm/v1/spec_decode/metrics.py"
_DETAILS = "SGLang 0.5.23 srt/managers/tokenizer_manager.py _calculate_spec_decoding_metrics"
_REPORTER = "SGLang 0.5.23 srt/managers/scheduler_components/metrics_reporter.py"

DEFINITIONS = (
    Definition(
        VLLM,
        "vllm:spec_decode_num_drafts_total",
        "request steps that carried drafts; a step without drafts is not counted",
        "verify steps",
        f"{_COUNTERS} SpecDecodingStats.observe_draft",
    ),
    Definition(
        VLLM,
        "vllm:spec_decode_num_accepted_tokens_total",
        "accepted drafts, without the target's own token, before the end of the text is cut",
        "acceptance length = 1 + it / num_drafts",
        f"{_COUNTERS} SpecDecodingProm",
    ),
    Definition(
        VLLM,
        "vllm:spec_decode_num_draft_tokens_total",
        "drafted tokens, without those that a grammar ruled out",
        "acceptance rate = num_accepted_tokens / it, where every step drafts K",
        f"{_COUNTERS} SpecDecodingProm",
    ),
    Definition(
        VLLM,
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{position="i"}',
        "steps that accepted the draft at position i, from 0",
        "rate of position i + 1 = it / num_drafts",
        f"{_COUNTERS} SpecDecodingProm",
    ),
    Definition(
        VLLM,
        "metrics.speculative_decoding.acceptance_histogram",
        "of one answer: steps that accepted 0, 1, .. K drafts",
        "verify steps of that prompt",
        "vLLM 0.33.0 vllm/v1/metrics/stats.py RequestSpecDecodeMetrics",
    ),
    Definition(
        SGLANG,
        "spec_verify_ct",
        "verify steps of one answer",
        "verify steps",
        _DETAILS,
    ),
    Definition(
        SGLANG,
        "spec_num_correct_drafts",
        "accepted drafts, without the target's own token, before the end of the text is cut",
        "acceptance length = 1 + it / spec_verify_ct",
        _DETAILS,
    ),
    Definition(
        SGLANG,
        "spec_correct_drafts_histogram",
        "of one answer: steps that accepted 0, 1, .. drafts, up to the last that is not zero",
        "verify steps of that prompt",
        "SGLang 0.5.23 srt/managers/schedule_batch.py update_spec_correct_drafts_histogram",
    ),
    Definition(
        SGLANG,
        "spec_accept_rate",
        "correct drafts / (verify steps * (D - 1)), D draft tokens with the root",
        "acceptance rate of a chain; of a tree a share of its nodes, which is another quantity",
        _DETAILS,
    ),
    Definition(
        SGLANG,
        "spec_accept_length",
        "tokens of the answer / verify steps: with the prompt's own token, without tokens after the end",
        "none: not read",
        _DETAILS,
    ),
    Definition(
        SGLANG,
        "internal_states[].avg_spec_accept_length",
        "accepted drafts + 1 a step, over all requests since the start, as of the last log line",
        "acceptance length, of all that the engine ever answered: told, not compared",
        f"{_REPORTER} spec_total_num_accept_tokens",
    ),
    Definition(
        SGLANG,
        "sglang:spec_accept_length",
        "the same over the last log interval; 0 before the first one",
        "none: a gauge of a window has no prompts",
        f"{_REPORTER} report_decode_stats",
    ),
)
