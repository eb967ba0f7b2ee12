"""Answers to command lines with flags, settings or values that are not there."""

import ast
import contextlib
import difflib
import itertools
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from llava_jax.errors import ConfigError

if TYPE_CHECKING:
    from ml_collections import ConfigDict


def answer(argv: Sequence[str], error: Exception) -> str:
    """What is wrong with a command line whose flags could not be parsed, and what to write instead.

    All flags and settings that are not there are answered, a line each, and not only the first, which `error` is of.
    """
    given = _given(argv)
    if "config" in flags.FLAGS:
        for path in (given.get("config", ""), *argv[1:2]):
            if path.endswith((".yaml", ".yml", ".json")) and not path.startswith("-"):
                return _recipe_of_another_trainer(path)
    return (
        _wrong_names(given)
        or _missing(error)
        or _wrong_value(error, given)
        or _failing_recipe(error, given)
        or _summary(error, given)
    )


def unreadable_recipe(argv: Sequence[str], error: OSError) -> str:
    """What to say of a recipe's file that cannot be read."""
    given = _given(argv).get("config", "").partition(":")[0]
    path = Path(given)
    if path.is_file():
        return f"The recipe {given} cannot be read: {str(error).strip().splitlines()[-1].strip()}"
    others = sorted(other.name for other in path.parent.glob("*.py"))
    if near := difflib.get_close_matches(path.name, others, n=1):
        return f"--config={given} is no recipe. Did you mean {path.with_name(near[0])}?"
    return f"--config={given} is no recipe. The project's own are in its directory configs."


def _recipe_of_another_trainer(path: str) -> str:
    """What the keys of a YAML or JSON file of settings are called here, a line each."""
    from llava_jax.known_names import explain

    lines = [
        f"{path} is no recipe: recipes are Python files. Take the nearest of configs/, say --config=configs/NAME.py, and "
        "give what differs as --config.KEY=VALUE."
    ]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        keys = re.findall(
            r"(?:^|[{,])\s*\"?(\w+)\"?\s*:", Path(path).read_text(encoding="utf-8"), re.MULTILINE
        )
        lines += [explain(key) or f"`{key}` is not known here." for key in dict.fromkeys(keys)]
    return "\n".join(lines)


def _given(argv: Sequence[str]) -> dict[str, str]:
    """All flags of a command line, known or not, with what is written as their value: {"config.seed": "1", ...}."""
    given = {}
    words = [*argv[1:], ""]
    for word, following in itertools.pairwise(words):
        if match := re.fullmatch(r"--?([A-Za-z_][^=]*)(?:=(.*))?", word, re.DOTALL):
            name, value = match.groups()
            given[name] = value if value is not None else "" if following.startswith("-") else following
    return given


def _wrong_names(given: dict[str, str]) -> str:
    """A line for each flag that the command does not have and each setting that the recipe does not have."""
    recipe = _load_recipe(given.get("config"))
    settings, unknown = [], []
    for name, value in given.items():
        override = re.fullmatch(r"(?:no)?config\.(.+)", name)
        if override and "config" in flags.FLAGS:
            if recipe and _section(recipe, override[1].split("."))[1]:
                settings.append(_no_setting(recipe, override[1], value))
        elif name not in flags.FLAGS and name.removeprefix("no") not in flags.FLAGS:
            unknown.append(_no_flag(name))
    if unknown and "config" in flags.FLAGS:
        unknown.append(_how_settings_are_written(tuple(recipe.get("stage_order", ())) if recipe else ()))
    return "\n".join(settings + unknown)


def _how_settings_are_written(stages: tuple[str, ...]) -> str:
    if not stages:
        return "Settings are written --config.KEY=VALUE."
    return (
        "Settings are written --config.KEY=VALUE, those of a stage --config.stages.STAGE.KEY=VALUE; the stages are "
        f"{', '.join(stages)}."
    )


def _load_recipe(path: str | None) -> "ConfigDict | None":
    """The recipe, whose flag may not have been parsed to its end; None if there is none, or none that loads."""
    if not path or "config" not in flags.FLAGS:
        return None
    with contextlib.suppress(Exception):  # of which the caller has one
        recipe = flags.FLAGS["config"].parser.parse(path)
        return recipe if hasattr(recipe, "keys") else None
    return None


def _section(recipe: "ConfigDict", parts: Sequence[str]) -> tuple["ConfigDict", Sequence[str]]:
    """The innermost section that a path of names leads to, and the names that it does not have."""
    for index, part in enumerate(parts):
        name = part.partition("[")[0]  # a member of a tuple
        if not hasattr(recipe, "keys") or name not in recipe:
            return recipe, parts[index:]
        if not hasattr(recipe[name], "keys"):
            return recipe, parts[index + 1 :]
        recipe = recipe[name]
    return recipe, ()


def _no_setting(recipe: "ConfigDict", path: str, value: str) -> str:
    """What to write instead of a setting that the recipe does not have."""
    from llava_jax.config_values import meant

    stages = tuple(recipe.get("stage_order", ()))
    stage, key = re.fullmatch(r"(?:stages\.([^.]+)\.?)?(.*)", path).groups()
    message = f"The recipe has no setting {path}."
    if stages and stage and stage not in stages:
        near = difflib.get_close_matches(stage, stages, n=1)
        return f"{message} Its stages are {', '.join(stages)}.{f' Did you mean {near[0]}?' if near else ''}"
    settings, elsewhere = meant(key)
    written = [flag for setting in settings for flag in _flags_of(setting, recipe, stage, stages)]
    if settings == (key,):
        return f"{message} Write {' or '.join(f'{flag}={value}' for flag in written)}."
    if elsewhere:
        return f"{message} {elsewhere}" + (f" Write {' or '.join(written)}." if stages and written else "")
    if written:
        return f"{message} Did you mean {' or '.join(written)}?"
    known = _section(recipe, path.split("."))[0]
    return f"{message} Known there: {', '.join(sorted(known))}."


def _flags_of(setting: str, recipe: "ConfigDict", stage: str | None, stages: tuple[str, ...]) -> list[str]:
    """How a setting is given: for the recipe as a whole, for the one stage in question, or for each."""
    if setting.startswith("--"):
        return [setting]
    if setting.partition(".")[0] in recipe:
        return [f"--config.{setting}"]
    return [f"--config.stages.{name}.{setting}" for name in ([stage] if stage else stages)]


def _no_flag(name: str) -> str:
    """What to write instead of a flag that the command does not have."""
    from llava_jax.config_values import meant
    from llava_jax.known_names import explain

    message, plain = f"There is no flag --{name}.", name.replace("-", "_")
    if plain in flags.FLAGS:
        return f"{message} Did you mean --{plain}?"
    if elsewhere := explain(name):
        return f"{message} {elsewhere}"
    if near := difflib.get_close_matches(plain, list(flags.FLAGS), n=1, cutoff=0.8):
        return f"{message} Did you mean --{near[0]}?"
    settings, elsewhere = meant(plain)
    if elsewhere:
        return f"{message} {elsewhere}"
    if settings and "config" in flags.FLAGS:
        return f"{message} Did you mean {' or '.join(f'--config.{setting}' for setting in settings)}?"
    return message


def _missing(error: Exception) -> str:
    """The flags that the command asks for and that were not given, with their help."""
    names = re.findall(r"Flag --(\w+) must have a value other than None", str(error))
    return " ".join(f"--{name} is missing: {flags.FLAGS[name].help}" for name in names)


def _wrong_value(error: Exception, given: dict[str, str]) -> str | None:
    """What a setting takes that was given a value of another type."""
    from llava_jax.config_values import wrong_type

    match = re.match(r"flag --config\.([\w.]+)=", str(error))
    if not match or not isinstance(error, flags.IllegalFlagValueError):
        return None
    return wrong_type(match[1], given[f"config.{match[1]}"])


def _failing_recipe(error: Exception, given: dict[str, str]) -> str | None:
    """Where a recipe's own code went wrong; None for what others raise for it."""
    recipe = given.get("config", "").partition(":")[0]
    if isinstance(error, SyntaxError):
        line, message = error.lineno, error.msg
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if recipe and recipe in frame.filename
        ]
        if not frames or isinstance(error, flags.Error | ConfigError):
            return None
        line, message = frames[-1].lineno, error
    return f"The recipe {recipe} fails in line {line}: {type(error).__name__}: {message}."


def _summary(error: Exception, given: dict[str, str]) -> str:
    """What went wrong in one line. For a recipe that raised, ml_collections gives its traceback: take the end."""
    message = str(error.args[0] if error.args else error)
    if "Traceback (most recent call last)" in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    if "has no attribute 'get_config'" in message:
        return f"--config={given['config']} is no recipe: it has no get_config(), which returns the settings."
    if message.startswith("get_config() missing"):
        return f"The recipe {given['config']} wants an argument; write --config={given['config']}:ARGUMENT. ({message})"
    if message.startswith("get_config() takes 0 positional arguments"):
        recipe, _, argument = given["config"].partition(":")
        return f"{recipe} takes no argument, as {argument!r} is one; write --config={recipe}."
    # A KeyError's message is quoted with its line ends spelled out, and it may lie in another's.
    for _ in range(2):
        with contextlib.suppress(SyntaxError, ValueError):
            message = str(ast.literal_eval(message))
    if key := re.fullmatch(r"\W*([A-Za-z_]\w*)\W*?(?:\s+Did you mean\W+(\w+).*)?", message, re.DOTALL):
        near = f" Did you mean {key[2]!r}?" if key[2] else ""
        return f"The recipe asks for {key[1]!r}, which is not there.{near}"
    return " ".join(message.split())
