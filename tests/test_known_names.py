"""Every name that people bring along is answered, and no setting of ours goes unread."""

import ast
import dataclasses
import pkgutil
import re
import typing
from pathlib import Path

import pytest

from llava_jax.config import Config, ConfigError
from llava_jax.config_values import build
from llava_jax.known_names import TABLE, explain, to_markdown

ROOT = Path(__file__).parent.parent
LINES = (ROOT / "tests/data/names_elsewhere.txt").read_text().splitlines()
FLAGS = ("--workdir", "--coordinator", "--num_processes", "--process_id")


def settings(cls=Config, prefix="") -> dict[str, type]:
    """All settings by full name, with the section they are a field of."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= settings(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = cls
    return found


def test_every_name_of_the_other_trainers_has_a_counterpart_or_a_reason():
    names = [line for line in LINES if not line.startswith("#")]
    assert len(names) > 120
    assert [name for name in names if not explain(name)] == []
    for names in TABLE.values():
        assert [
            name for name, counterpart in names.items() if not (counterpart.ours or counterpart.note)
        ] == []


def test_what_names_are_mapped_to_exists():
    known = settings().keys() | set(FLAGS)
    mapped = {own for names in TABLE.values() for counterpart in names.values() for own in counterpart.ours}
    assert sorted(mapped - known) == []
    source = (ROOT / "llava_jax/train.py").read_text()
    assert all(f'"{flag.removeprefix("--")}"' in source for flag in FLAGS)


def test_no_name_stands_in_the_table_twice():
    names = [name for names in TABLE.values() for name in names]
    assert len(names) == len(set(names))


def test_the_page_of_names_is_the_table():
    assert (ROOT / "docs/names.md").read_text() == to_markdown(), (
        "run python -m llava_jax.known_names > docs/names.md"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"per_device_train_batch_size": 16},
            "Unknown key 'per_device_train_batch_size'. `per_device_train_batch_size` is `data.batch_size` here: rows "
            "of an optimizer step over all devices and accumulation, not per device.",
        ),
        ({"optimizer": {"optim": "adamw"}}, "`optim` is `optimizer.name` here: adamw, adamw_8bit"),
        ({"model": {"mpt_attn_impl": "triton"}}, "`mpt_attn_impl` has no counterpart here: "),
        ({"train": {"num_train_epochs": 1.0}}, "`num_train_epochs` is `train.num_epochs` here."),
        ({"train": {"log_step": 1}}, "Did you mean 'log_steps'?"),
    ],
)
def test_an_unknown_key_that_is_known_elsewhere_is_answered(fields, message):
    with pytest.raises(ConfigError) as error:
        build(Config, fields, "")
    assert message in str(error.value)


def reads() -> tuple[set[str], list[str]]:
    """Attributes that the package reads, and patterns of those it reads by name.

    What the schema reads of itself counts only in methods and properties that are themselves read.
    """
    trees = {path: ast.parse(path.read_text()) for path in (ROOT / "llava_jax").rglob("*.py")}
    schema = trees.pop(ROOT / "llava_jax/config.py")
    del trees[ROOT / "llava_jax/known_names.py"]
    names, patterns = set(), []
    for tree in trees.values():
        _collect(tree, names, patterns)
    methods = [
        node
        for section in ast.walk(schema)
        if isinstance(section, ast.ClassDef)
        for node in section.body
        if isinstance(node, ast.FunctionDef) and node.name != "__post_init__"
    ]
    for _ in methods:  # one may be read by the one before it
        for method in methods:
            if method.name in names:
                _collect(method, names, patterns)
    return names, patterns


def _collect(tree: ast.AST, names: set[str], patterns: list[str]) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            names.add(node.attr)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            patterns.append(_pattern(node.args[1]))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names.add(node.value)  # handed to whoever reads it


def _pattern(node: ast.expr) -> str:
    """What names a getattr's second argument can be, as far as its text says."""
    if isinstance(node, ast.Constant):
        return re.escape(node.value)
    if not isinstance(node, ast.JoinedStr):
        return r"(?!)"  # any name at all, which would prove nothing
    modules = "(vision_tower|projector|language_model)"
    parts = [
        re.escape(part.value)
        if isinstance(part, ast.Constant)
        else (modules if ast.unparse(part.value) == "module" else r"\w+")
        for part in node.values
    ]
    return "".join(parts)


def test_every_setting_is_read_somewhere():
    names, patterns = reads()
    unread = [
        key
        for key in settings()
        if (name := key.rpartition(".")[2]) not in names
        and not any(re.fullmatch(pattern, name) for pattern in patterns)
    ]
    assert unread == []


def test_the_functions_that_the_table_for_tinyllava_names_exist():
    page = (ROOT / "docs/conversion.md").read_text()
    _, _, table = page.partition("## For those who know TinyLLaVA Factory")
    names = re.findall(r"`(llava_jax\.[\w.]+)`", table.partition("\n## ")[0])
    assert len(names) > 10
    for name in names:
        assert pkgutil.resolve_name(name)
