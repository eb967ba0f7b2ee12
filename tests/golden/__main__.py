"""python -m tests.golden DIR [--tokenizer=PATH]: compares this project with outputs of the original LLaVA."""

import argparse
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.golden import Skipped

SETS = {
    "A_tokenize": "tokenize",
    "B_images": "images",
    "C_sampler": "sampler",
    "D_model": "model",
    "E_train": "training",
}
DEFAULT_TOKENIZER = Path("../shared/tokenizer/llama/tokenizer.model")
DIFFERENCES_SHOWN = 5


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    parser.add_argument("dir", type=Path, help="folder that holds the sets " + ", ".join(SETS))
    parser.add_argument("--tokenizer", type=Path, help="the tokenizer.model that the sets were made with")
    options = parser.parse_args(arguments)
    tokenizer = options.tokenizer or (DEFAULT_TOKENIZER if DEFAULT_TOKENIZER.exists() else None)
    if tokenizer is not None and not tokenizer.exists():
        parser.error(f"--tokenizer={tokenizer}: there is no such file")

    folders = sorted(folder for folder in options.dir.glob("*") if folder.is_dir())
    passed = failed = 0
    for folder in folders:
        module = SETS.get(folder.name)
        if module is None or importlib.util.find_spec(f"tests.golden.{module}") is None:
            print(f"{folder.name}: not compared; nothing here does that yet")
            continue
        check = importlib.import_module(f"tests.golden.{module}").check
        good, bad = report(folder.name, check(folder, tokenizer))
        passed += good
        failed += bad
    if passed + failed == 0:
        print(f"{options.dir}: nothing was compared; it should hold one of {', '.join(SETS)}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or not passed else 0


def report(name: str, results: Iterable[tuple[str, str | None]]) -> tuple[int, int]:
    """Prints what came out of one set; returns how many cases passed and failed."""
    results = list(_until_error(results))
    skipped = [(case, why) for case, why in results if isinstance(why, Skipped)]
    failures = [(case, why) for case, why in results if why is not None and not isinstance(why, Skipped)]
    passed = len(results) - len(skipped) - len(failures)
    print(f"{name}: {passed} passed, {len(failures)} failed, {len(skipped)} skipped")
    for reason in sorted({str(why) for _, why in skipped}):
        print(f"  skipped {sum(why == reason for _, why in skipped)}: {reason}")
    for case, why in failures[:DIFFERENCES_SHOWN]:
        print(f"  {case}: {why}")
    if len(failures) > DIFFERENCES_SHOWN:
        print(f"  ... and {len(failures) - DIFFERENCES_SHOWN} more")
    return passed, len(failures)


def _until_error(results: Iterable[tuple[str, str | None]]) -> Iterator[tuple[str, str | None]]:
    """The results, with a crash as the last one's difference, so that other sets are still compared."""
    try:
        yield from results
    except Exception as error:
        traceback.print_exc()
        yield "the rest", f"raised {type(error).__name__}: {error}"


if __name__ == "__main__":
    sys.exit(main())
