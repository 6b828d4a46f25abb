"""Claim: every kernel compiles for Hopper (sm_90) without spilling registers and within its shared memory.

The interpreter accepts what the compiler does not: loops that change a type, products of fewer than 16 columns, tiles
that fit no memory. Compiling needs no GPU, but an environment without TRITON_INTERPRET, so it runs in a process of its
own: this file, run as a script.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

pytestmark = pytest.mark.correctness

ROOT = Path(__file__).parents[2]
SHARED_BYTES = 232_448  # what one program may use on Hopper


class Variant(NamedTuple):
    """One kernel with one set of constants; `types` are the arguments that are no constants, in order."""

    module: str
    kernel: str
    types: str
    constants: dict[str, int | bool | None]
    warps: int = 4


PRODUCT = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128, "STAGES": 4, "WHOLE": True}
HEADS = {"Q_HEADS": 32, "KV_HEADS": 8, "WIDTH": 128}
CHUNKS = {"CHUNK": 256, "BLOCK_M": 16, "BLOCK_S": 64, "BLOCK_D": 128, "STAGES": 2}
WIDE = {"Q_HEADS": 32, "KV_HEADS": 4, "WIDTH": 512, "CHUNK": 256, "BLOCK_M": 16, "BLOCK_S": 32, "BLOCK_D": 512}
LLAMA_NORM = {"CAST_FIRST": True, "PLUS_ONE": False, "BLOCK": 4096}
TURN = {"NORM_Q": True, "NORM_K": True, "NORM_V": False, "PLUS_ONE": False, "K_EQ_V": False, "HEADS": 8}
LATENT = {"Q_HEADS": 128, "RANK": 512, "ROPE": 64, "BLOCK_R": 512, "BLOCK_D": 64}
NO_TREE = {"tree_first": None, "words": None, "HAS_TREE": False}
LATENT_CHUNKS = {"CHUNK": 128, "BLOCK_M": 32, "BLOCK_S": 32, "STAGES": 2}
EXPERT = {"BLOCK_N": 16, "BLOCK_K": 256, "STAGES": 3, "WHOLE": True}
GROUPS = {"GROUPS": 8, "SIZE": 32, "TOP_GROUPS": 4, "BLOCK_G": 8, "BLOCK_E": 32, "BLOCK_P": 8}
ROUTE = {"scale": None, "SIGMOID": True, "HAS_BIAS": True, "HAS_SCALE": False, "RENORMALISE": True, **GROUPS}

VARIANTS = {
    "norm": Variant(
        "norm",
        "add_rmsnorm_kernel",
        "bbbbb if",
        {"scale": None, "HAS_RESIDUAL": True, "HAS_WEIGHT": True, "HAS_SCALE": False, **LLAMA_NORM},
    ),
    "norm, add, norm": Variant(
        "norm",
        "sandwich_norm_kernel",
        "bbbbbbb if",
        {"HAS_POST": True, "HAS_PRE": True, "HAS_SCALE": True, **LLAMA_NORM, "CAST_FIRST": False, "PLUS_ONE": True},
    ),
    "linear": Variant("linear", "linear_kernel", "bbb iii", {"bias": None, "HAS_BIAS": False, **PRODUCT}),
    "linear, 64 rows": Variant(
        "linear", "linear_kernel", "bbbb iii", {"HAS_BIAS": True, **PRODUCT, "BLOCK_M": 64, "STAGES": 3}
    ),
    "gate_up": Variant(
        "linear",
        "gate_up_kernel",
        "bbb iii",
        {"bias": None, "HAS_BIAS": False, "GELU": True, **PRODUCT, "WHOLE": False},
    ),
    "head": Variant("head", "head_tile_kernel", "bbfI iiis", {"SCALED": True, **PRODUCT}),
    "rope": Variant("rope", "rope_kernel", "bLLbLbbbbb iif", {**HEADS, **TURN, "BLOCK": 128}),
    "rope, heads of 512": Variant(
        "rope",
        "rope_kernel",
        "bLLbLbbbbb iif",
        {**TURN, "Q_HEADS": 32, "KV_HEADS": 4, "WIDTH": 512, "K_EQ_V": True, "NORM_V": True, "BLOCK": 512},
    ),
    "attend": Variant(
        "attention",
        "attend_chunk_kernel",
        "bbbLfff siiii",
        {"ends": None, "HAS_ENDS": False, **NO_TREE, "HAS_WINDOW": True, **HEADS, **CHUNKS},
    ),
    "attend, images": Variant(
        "attention",
        "attend_chunk_kernel",
        "bbbLLfff siiii",
        {"HAS_ENDS": True, **NO_TREE, "HAS_WINDOW": True, **HEADS, **CHUNKS},
    ),
    "attend, trees": Variant(
        "attention",
        "attend_chunk_kernel",
        "bbbLLLfff siiii",
        {"ends": None, "HAS_ENDS": False, "HAS_TREE": True, "HAS_WINDOW": True, **HEADS, **CHUNKS},
    ),
    "attend, heads of 512": Variant(
        "attention",
        "attend_chunk_kernel",
        "bbbLfff siiii",
        {"ends": None, "HAS_ENDS": False, **NO_TREE, "HAS_WINDOW": False, **WIDE, "STAGES": 2},
    ),
    "attend, latents": Variant(
        "latent", "attend_latent_kernel", "bbbLfff siii", {**NO_TREE, **LATENT, **LATENT_CHUNKS}, 8
    ),
    "attend, latents of trees": Variant(
        "latent", "attend_latent_kernel", "bbbLLLfff siii", {"HAS_TREE": True, **LATENT, **LATENT_CHUNKS}, 8
    ),
    "latent write": Variant(
        "latent", "latent_write_kernel", "bbLLbLb iiif", {"RANK": 512, "ROPE": 64, "BLOCK_R": 512, "BLOCK_D": 64}
    ),
    "product by head": Variant(
        "latent", "heads_kernel", "bbb iiiiii", {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "STAGES": 2}
    ),
    "experts, gate_up": Variant("experts", "experts_gate_up_kernel", "bLbb iiiii", {"GELU": False, **EXPERT}),
    "experts, down": Variant(
        "experts", "experts_down_kernel", "bLfbb iiiii", {k: v for k, v in EXPERT.items() if k != "WHOLE"}
    ),
    "route": Variant("routing", "route_kernel", "ffLf if", ROUTE),
    "merge": Variant("attention", "attend_merge_kernel", "fffb ii", {"WIDTH": 128, "BLOCK_M": 4, "BLOCK_D": 128}),
    "head merge": Variant("head", "head_merge_kernel", "fIfL i", {"BLOCK": 2048}),
    "argmax": Variant("head", "argmax_kernel", "bL i", {"BLOCK": 4096}),
    "embed": Variant("moves", "embed_kernel", "Lbb iiif", {"SCALED": True, "BLOCK": 1024}),
    "gather": Variant("moves", "gather_rows_kernel", "bLb ii", {"BLOCK": 1024}),
    "compact": Variant("moves", "compact_kernel", "bLL ii", {"NUM_MOVED": 6, "BLOCK_P": 8, "BLOCK": 1024}),
    "accept": Variant("moves", "accept_greedy_kernel", "LLL i", {"BLOCK": 4}),
}
TYPES = {"b": "*bf16", "f": "*fp32", "I": "*i32", "L": "*i64", "i": "i32", "s": "fp32"}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What the compiler said of every variant; all of them in one process."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_kernel_fits_the_machine(compiled: dict[str, dict[str, int]], name: str) -> None:
    found = compiled[name]

    assert found["spilled"] == 0
    assert found["shared"] <= SHARED_BYTES


@pytest.mark.parametrize(
    "name", ["linear", "linear, 64 rows", "gate_up", "head", "attend", "attend, latents", "product by head"]
)
def test_weights_and_keys_stream_ahead_of_the_product(compiled: dict[str, dict[str, int]], name: str) -> None:
    found = compiled[name]

    assert found["async_copies"] > 0
    assert found["tensor_core_products"] > 0


def compile_variant(variant: Variant) -> dict[str, int]:
    """Compile for sm_90 and read the assembler's report."""
    kernel = getattr(importlib.import_module(f"optimized.ops.kernels.{variant.module}"), variant.kernel)
    names = [name for name in kernel.arg_names if name not in variant.constants]
    pointers, scalars = variant.types.split()
    # the last scalar of a kernel may be a float: eps, scale
    letters = pointers + "".join("s" if letter == "f" else letter for letter in scalars)
    signature = dict.fromkeys(kernel.arg_names, "constexpr")
    signature |= {name: TYPES[letter] for name, letter in zip(names, letters, strict=True)}
    # addresses and sizes that 16 divides, as the launcher finds for real models
    divisible = [kernel.arg_names.index(n) for n, kind in signature.items() if kind.startswith("*") or kind == "i32"]
    attrs = {(index,): [["tt.divisibility", 16]] for index in divisible}
    constants = {(kernel.arg_names.index(name),): value for name, value in variant.constants.items()}
    source = ASTSource(kernel, signature, constants, attrs)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": variant.warps})
    ptx = code.asm["ptx"]
    return {
        "shared": code.metadata.shared,
        "spilled": spilled(ptx),
        "async_copies": ptx.count("cp.async.cg"),
        "tensor_core_products": ptx.count("mma.sync") + ptx.count("wgmma.mma_async"),
    }


def spilled(ptx: str) -> int:
    """Bytes of registers that the assembler had to store."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill stores", report))


if __name__ == "__main__":
    json.dump({name: compile_variant(variant) for name, variant in VARIANTS.items()}, sys.stdout)
