"""What all commands share: how errors end them, and their first line before anything heavy is imported."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import app, flags, logging

from llava_jax.gpus import set_memory_limits
from llava_jax.wrong_flags import answer, unreadable_recipe

if TYPE_CHECKING:
    from llava_jax.recipe import Recipe

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of errors.")


def run_command(main: Callable[[], None]) -> None:
    """Parses the flags and calls main(); a user's mistake becomes one paragraph and its exit code."""
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no text
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    set_memory_limits()
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is no news
    logging.set_verbosity(
        logging.FATAL
    )  # orbax warns of its own layout, and prints tracebacks of what it raises
    app.run(lambda _: _end_with_errors(main), flags_parser=_parse_flags)


def read_recipe(flag: flags.FlagHolder) -> "Recipe":
    """The recipe of a --config flag, validated."""
    from llava_jax.config import ConfigError
    from llava_jax.recipe import parse

    try:
        return parse(flag.value)
    except OSError as error:  # ml_collections tells only now that it could not load the file
        raise ConfigError(unreadable_recipe(sys.argv, error)) from error


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except Exception as error:  # a recipe is code, which may raise anything
        if "--debug" in argv:
            raise
        _fail(f"{answer(argv, error)} (--help lists the flags, docs/recipes.md the settings.)", 10)
    if len(rest) > 1:
        _fail(f"Unexpected argument {rest[1]!r}; flags are written --name=value.", 10)
    return rest


def _end_with_errors(main: Callable[[], None]) -> None:
    from llava_jax.errors import StoppedError, UserError

    try:
        main()
    except StoppedError as stopped:
        print(stopped, flush=True)
        sys.exit(stopped.exit_code)
    except UserError as error:
        if DEBUG.value:
            raise
        _fail(str(error), error.exit_code)
    except OSError as error:
        if DEBUG.value:
            raise
        _fail(f"{error}. Nothing that was saved before is lost; mend it and run the same command again.", 12)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr, flush=True)
        os._exit(130)  # threads that still read ahead could crash an orderly end


def _fail(message: str, exit_code: int) -> None:
    sys.stdout.flush()
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
