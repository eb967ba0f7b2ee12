"""Set C: orders of samples, with the original's random permutations replayed."""

import json
from collections.abc import Iterator
from pathlib import Path

from llava_jax.data.samplers import (
    get_length_grouped_indices,
    get_modality_length_grouped_indices,
    split_to_even_chunks,
)
from llava_jax.errors import DataError
from tests.golden.files import read_bytes


def check(folder: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    del tokenizer
    for line in read_bytes(folder / "cases.jsonl").decode().splitlines():
        case = json.loads(line)
        yield case["id"], _compare(case)


def _compare(case: dict) -> str | None:
    permutations = list(case["permutations"])

    def replay(size: int) -> list[int]:
        drawn = permutations.pop(0) if permutations else {"n": 0, "perm": []}
        assert drawn["n"] == size, (
            f"asked for a permutation of {size}, where the original drew one of {drawn['n']}"
        )
        return drawn["perm"]

    try:
        result = _call(case, replay)
    except DataError as error:
        return None if case["error"] else f"raised {error}"
    except AssertionError as error:
        return str(error)
    if case["error"]:
        return f"did not raise, where the original did: {case['error']['message']}"
    if permutations:
        return f"{len(permutations)} permutations were not used"
    if result != case["result"]:
        return f"{str(result)[:60]} ..., not {str(case['result'])[:60]} ..."
    return None


def _call(case: dict, permutations) -> list:
    if case["function"] == "split_to_even_chunks":
        return split_to_even_chunks(case["indices"], case["lengths"], case["num_chunks"])
    functions = (get_length_grouped_indices, get_modality_length_grouped_indices)
    function = {function.__name__: function for function in functions}[case["function"]]
    return function(case["lengths"], case["batch_size"], case["world_size"], generator=permutations)
