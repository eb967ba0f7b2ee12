"""Converts LLaVA weights between Hugging Face, the original LLaVA and llava_jax.

from-hf SRC DST                                      import a llava-hf or original LLaVA directory
from-hf --vision-tower=CLIP --language-model=LLM DST put a model together, with a new projector
to-hf SRC DST --layout=llava-hf|llava                export
verify A B                                           compare two models, of any layout, tensor by tensor
inspect PATH                                         say what a directory holds
"""

import argparse
import contextlib
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BAD_ARGUMENTS, BAD_MODEL = 10, 12
INTERRUPTED = 130  # as shells report Ctrl-C


class Parser(argparse.ArgumentParser):
    """Leaves with the exit code that all our commands use for bad arguments."""

    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(BAD_ARGUMENTS, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="convert_weights.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    command = commands.add_parser("from-hf", help="write a llava_jax model directory")
    command.add_argument("paths", nargs="+", metavar="[SRC] DST")
    command.add_argument("--vision-tower", default="", metavar="DIR", help="a CLIP directory")
    command.add_argument(
        "--language-model", default="", metavar="DIR", help="a Llama-like directory, without SRC"
    )
    command.add_argument("--seed", type=int, default=0, help="of the new projector, without SRC")
    command.set_defaults(run=from_hf)

    command = commands.add_parser("to-hf", help="write a directory that other software loads")
    command.add_argument("source", metavar="SRC")
    command.add_argument("destination", metavar="DST")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP directory, if SRC holds none"
    )
    command.add_argument("--layout", choices=("llava-hf", "llava"), default="llava-hf")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in SRC")
    command.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="default: 5GB"
    )
    command.set_defaults(run=to_hf)

    command = commands.add_parser("verify", help="exit with 1 if two models differ")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP directory, if one holds none"
    )
    command.set_defaults(run=verify)

    command = commands.add_parser("inspect", help="layout, shapes, parameter counts")
    command.add_argument("path", metavar="PATH")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP directory, if PATH holds none"
    )
    command.set_defaults(run=inspect)

    arguments = parser.parse_args(argv)
    from absl import logging

    from llava_jax.errors import UserError

    logging.set_verbosity(logging.ERROR)  # orbax warns of its own layout
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that torch is absent is no news
    try:
        return arguments.run(arguments, parser) or 0
    except (UserError, OSError) as error:
        if arguments.debug:
            raise
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_MODEL)
    except KeyboardInterrupt:
        print("convert_weights.py: interrupted; what was written so far is removed.", file=sys.stderr)
        return INTERRUPTED


def byte_count(text: str) -> int:
    """A size like 5GB -> 5000000000. Units: KB, MB, GB and KiB, MiB, GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB")
    unit = (match[2] or "").lower()
    power = " kmg".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def open_source(path: str, vision_tower: str = ""):
    """The one place where a command opens what it was given."""
    from llava_jax.weights import open_any

    return open_any(path, vision_tower=vision_tower)


def progress_line(model):
    """Tells how much of a model has been handled; see `ProgressLine`."""
    from llava_jax.convert.progress import ProgressLine

    return contextlib.closing(ProgressLine(model.num_bytes()))


def from_hf(arguments, parser) -> None:
    (*source, destination) = arguments.paths
    if len(source) > 1:
        parser.error(f"from-hf takes one SRC and one DST, not {len(source) + 1} paths")
    if source and arguments.language_model:
        parser.error("give SRC, which has a decoder, or --language-model, not both")
    if not source and not (arguments.vision_tower and arguments.language_model):
        parser.error("without SRC both --vision-tower and --language-model are needed")
    if source:
        print(f"Reading {source[0]}", flush=True)
        model = open_source(source[0], arguments.vision_tower)
    else:
        print(f"Reading {arguments.vision_tower} and {arguments.language_model}", flush=True)
        model = assemble(arguments.vision_tower, arguments.language_model, arguments.seed)
    from llava_jax.convert.ours import write_model

    with progress_line(model) as progress:
        write_model(destination, model, progress=progress)
    print(f"Wrote {destination} (from {model.layout}, {len(model.names())} arrays)")


def assemble(vision_tower: str, language_model: str, seed: int):
    """A model of two components and a projector that is drawn."""
    from llava_jax.config import ModelConfig
    from llava_jax.convert.opening import open_parts
    from llava_jax.weights import complete

    return complete(open_parts(ModelConfig(), vision_tower=vision_tower, language_model=language_model), seed)


def to_hf(arguments, parser) -> None:
    from llava_jax.config import ModelConfig
    from llava_jax.convert.errors import ConversionError

    print(f"Reading {arguments.source}", flush=True)
    model = open_source(arguments.source, arguments.vision_tower)
    if not isinstance(model.config, ModelConfig):
        raise ConversionError(
            f"{arguments.source} is only a component (layout {model.layout}), no whole LLaVA."
        )
    from llava_jax.convert.export import write_hf

    with progress_line(model) as progress:
        write_hf(
            arguments.destination,
            layout=arguments.layout,
            model=model.config,
            read=model.leaves.__getitem__,
            set_aside=model.set_aside(),
            tokenizer_path=model.tokenizer_path,
            template=model.template,
            image_aspect_ratio=model.image_aspect_ratio,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            progress=progress,
        )
    print(f"Wrote {arguments.destination} ({arguments.layout})")


def verify(arguments, parser) -> int:
    from llava_jax.convert.comparison import compare

    print(f"Comparing {arguments.first} and {arguments.second}", flush=True)
    sources = [open_source(path, arguments.vision_tower) for path in (arguments.first, arguments.second)]
    count = different = 0
    with progress_line(sources[0]) as progress:
        for difference in compare(*sources, progress=progress):
            count += 1
            different += not difference.equal
            verdict = "equal    " if difference.equal else "DIFFERENT"
            progress.clear()
            print(f"{verdict} {difference.name}: {difference.detail}", flush=True)
    print(f"{count - different} equal, {different} different")
    return 1 if different else 0


def inspect(arguments, parser) -> None:
    from llava_jax.convert.description import describe

    print(describe(open_source(arguments.path, arguments.vision_tower)))


if __name__ == "__main__":
    sys.exit(main())
