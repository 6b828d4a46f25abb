"""How trainers and engines write and read EAGLE-3 checkpoints: one table, each line with its source.

A row says what one consumer makes of one fact. `suites/formats/reading.py` acts on these rows and on nothing else, so
a line that is wrong here is wrong in the audit too, and `draftproof list dialects` prints them all. `where` narrows a
row to a kind of draft or target; a narrower row is asked before one that holds everywhere. Sources are paths in the
named release; rows were read there, and those of vLLM were also run. Rows of trainers say what the weights mean.
"""

from suites.formats.engines import SGLANG, TENSORRT_LLM, VLLM_V1, VLLM_V2
from suites.formats.rows import Dialect, unread
from suites.formats.trainers import (
    MODELOPT,
    OURS,
    SAFEAILAB,
    SPECFORGE,
    SPECULATORS,
    SPECULATORS_CONVERT,
    TORCHSPEC,
    TORCHSPEC_VLLM,
)

DRAFTPROOF = "draftproof"
DIALECTS = {
    dialect.name: dialect
    for dialect in (
        Dialect("safeailab", "SafeAILab EAGLE, ea_model", "cb7e0841", "engine", SAFEAILAB),
        Dialect(
            "safeailab-training",
            "SafeAILab EAGLE, traineagle3",
            "cb7e0841",
            "trainer",
            (*unread("traineagle3/cnets.py:208", "rope theta"), *SAFEAILAB),
        ),
        Dialect("specforge", "SpecForge", "0.2.0", "trainer", SPECFORGE),
        Dialect("speculators", "speculators", "0.9.0", "trainer", SPECULATORS),
        Dialect("speculators-convert", "speculators' converter", "0.9.0", "converter", SPECULATORS_CONVERT),
        Dialect("modelopt", "NVIDIA Model-Optimizer", "a2fbac7b", "trainer", MODELOPT),
        Dialect("torchspec", "TorchSpec", "6f21829", "trainer", TORCHSPEC),
        Dialect("torchspec-vllm", "TorchSpec, export for vLLM", "6f21829", "trainer", TORCHSPEC_VLLM),
        Dialect("tensorrt-llm", "TensorRT-LLM", "2025, PyTorch backend", "engine", TENSORRT_LLM),
        Dialect("sglang", "SGLang", "0.5.23", "engine", SGLANG),
        Dialect("vllm-v1", "vLLM, model runner V1", "0.33.0", "engine", VLLM_V1),
        Dialect("vllm-v2", "vLLM, model runner V2", "0.33.0", "engine", VLLM_V2),
        Dialect(DRAFTPROOF, "draftproof: every fact stated", "1", "trainer", OURS),
    )
}
ENGINES = tuple(name for name, dialect in DIALECTS.items() if dialect.role == "engine")
