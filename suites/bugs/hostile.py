"""Bugs of opening what a stranger sent: links and paths out of the folder, sizes believed before they are checked."""

import json
import pickle
from contextlib import nullcontext
from typing import Any

from harness.planting import Bug

CLAIMS = "suites/correctness/test_hostile_input.py"
WEIGHTS = f"{CLAIMS}::test_weights_made_to_harm_are_refused"
CONFIGS = f"{CLAIMS}::test_a_config_made_to_harm_is_refused"
SIZES = f"{CLAIMS}::test_a_size_that_the_file_cannot_hold_is_told_before_it_is_built"


def any_path(_: Any) -> Any:
    """A name of an index joined to the folder as it stands."""
    return lambda folder, name, index: folder / name


def as_it_stands(_: Any) -> Any:
    """Files followed wherever they lead."""
    return lambda file: file


def lenient(_: Any) -> Any:
    """Python's own JSON, with its NaN, its infinities and the last of two keys."""
    return json.loads


def anything_whole(_: Any) -> Any:
    """Whatever `int` takes."""
    return int


def unpickled(read: Any) -> Any:
    """A file that is not safetensors tried as a pickle, as `torch.load` does by name."""

    def headers(file: Any) -> Any:
        if file.read_bytes()[:1] == b"\x80":
            pickle.loads(file.read_bytes())
        return read(file)

    return headers


def built_at_once(_: Any) -> Any:
    """The model built before anybody looks at the file; where that takes all memory, the wait for it is left out."""

    def fitting(config: Any, num_tensors: int) -> Any:
        if getattr(config, "layers", 1) > 10_000:
            raise MemoryError
        return nullcontext()

    return fitting


BUGS = (
    Bug(
        "hostile-index-path",
        "os.path.join(folder, weight_map[name]), as loaders of sharded checkpoints do",
        "harness.headers._inside",
        any_path,
        f"{WEIGHTS}[an absolute path-draft]",
    ),
    Bug(
        "hostile-links-followed",
        "a file opened by name, whatever it is",
        "harness.headers.held_file",
        as_it_stands,
        f"{WEIGHTS}[a link outside-draft]",
    ),
    Bug(
        "hostile-lenient-json",
        "json.loads reads NaN, Infinity and takes the last of two keys",
        "harness.headers._parsed",
        lenient,
        f"{CONFIGS}[a key twice-draft]",
    ),
    Bug(
        "hostile-sizes-in-words",
        "int() of what a header says takes words, truth values and fractions",
        "harness.headers._whole",
        anything_whole,
        f"{WEIGHTS}[a size that is true-target]",
    ),
    Bug(
        "hostile-pickle-opened",
        "torch.load of whatever has the name of weights",
        "harness.headers._read_file_headers",
        unpickled,
        f"{WEIGHTS}[a pickle named as weights-draft]",
    ),
    Bug(
        "hostile-sizes-believed",
        "a model of as many layers as config.json says, built before a header is read",
        "suites.catalog.fitting",
        built_at_once,
        SIZES,
    ),
)
