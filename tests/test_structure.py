"""The house rules on who imports whom."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "llava_jax"
FILES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """All modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def uses(path: Path, *names: str) -> list[str]:
    return sorted(m for m in imports(path) if any(m == name or m.startswith(name + ".") for name in names))


COMMANDS = ("train", "generate", "chat", "evaluate", "score", "check_data", "plan")
# A file may import from its own line and the lines above it.
FLOORS = (
    (
        "__init__",
        "errors",
        "known_names",
        "config",
        "config_values",
        "recipe",
        "tuning",
        "metrics",
        "reporting",
        "results",
        "scores",
        "commands",
        "wrong_flags",
        "interruption",
        "watchdog",
        "digests",
        "flops",
        "gpus",
        "host_memory",
        "run_lock",
    ),
    ("kernels", "sharding", "processes", "agreement", "compiler"),
    ("models", "data", "optimizer", "optimizers"),
    (
        "convert",
        "step",
        "decoding",
        "recorder",
        "memory_peak",
        "profiling",
        "quickstart",
        "answers_page",
        "benchmark_scores",
    ),
    ("checkpoint", "saved_parameters", "program", "starting_adapters", "tuned_weights"),
    ("weights",),
    (
        "continuation",
        "generation",
        "model_card",
        "planning",
        "report",
        "run_adapter",
        "run_directory",
        "trainer_state",
        "validation",
    ),
    ("asking", "dialogue", "evaluation"),
    ("answer_samples", "stage"),
    ("final_evaluation",),
    ("trainer",),
    COMMANDS,
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_import_from_their_own_floor_and_those_below(path):
    floor = next(i for i, rooms in enumerate(FLOORS) if room(path) in rooms)
    above = [f"llava_jax.{name}" for rooms in FLOORS[floor + 1 :] for name in rooms]
    assert uses(path, *above) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_nevers(path):
    assert uses(path, "torch", "tensorflow") == []
    assert uses(path, *(f"llava_jax.{name}" for name in COMMANDS)) == []
    if room(path) == "models":
        assert (
            uses(path, *(f"llava_jax.{name}" for name in ("data", "sharding", "checkpoint", "convert"))) == []
        )
    if room(path) == "data":
        assert uses(path, "jax", "flax", "llava_jax.models", "llava_jax.convert", "transformers") == []
    if room(path) != "sharding":
        assert not re.search(r"""["'](fsdp|tensor)["']""", path.read_text()), "a mesh axis is spelled here"
    if room(path) != "convert":
        assert not re.search(
            r"embed_tokens\.weight|multi_modal_projector\.linear_\d\.weight", path.read_text()
        )
    assert path.stem not in ("utils", "common", "helpers", "misc")
