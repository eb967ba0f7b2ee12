"""Converts LLaVA weights between Hugging Face, the original LLaVA and llava_jax.

from-hf SRC DST                                      import a model of any layout
from-hf --vision-tower=TOWER --language-model=LLM DST put a model together, with a new projector
to-hf SRC DST --layout=llava-hf|llava                export
to-hf SRC DST --layout=llama                         export the decoder alone
to-hf RUN DST --layout=peft|peft-llava-hf            export only what a run by LoRA trained
to-hf SRC DST --only=projector                       export the projector alone
merge-lora BASE ADAPTER DST                          merge a PEFT LoRA adapter into its base
merge-lora RUN DST                                   merge what our own run by LoRA trained
verify A B [--logits]                                compare two models, of any layout, tensor by tensor
inspect PATH [--json]                                say what a directory or file holds
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BAD_ARGUMENTS, BAD_MODEL = 10, 12
INTERRUPTED = 130  # as shells report Ctrl-C


class Parser(argparse.ArgumentParser):
    """Takes --debug, and leaves with the exit code that all our commands use for bad arguments."""

    def __init__(self, **settings):
        super().__init__(**settings)
        # Given before the command or after it; one that does not have it leaves the other's alone.
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )

    def error(self, message):
        self.print_usage(sys.stderr)
        self.exit(BAD_ARGUMENTS, f"{self.prog}: {message}\n")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(
        prog="convert_weights.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)

    command = commands.add_parser("from-hf", help="write a llava_jax model directory")
    command.add_argument("paths", nargs="+", metavar="[SRC] DST")
    command.add_argument("--vision-tower", default="", metavar="DIR", help="a CLIP or SigLIP directory")
    command.add_argument(
        "--language-model", default="", metavar="DIR", help="a Llama-like directory, without SRC"
    )
    command.add_argument("--seed", type=int, default=0, help="of the new projector, without SRC")
    command.add_argument(
        "--template", default="", metavar="NAME", help="conversation template (default: as in SRC, else v1)"
    )
    command.set_defaults(run=from_hf)

    command = commands.add_parser("to-hf", help="write a directory that other software loads")
    command.add_argument("source", metavar="SRC")
    command.add_argument("destination", metavar="DST")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP or SigLIP directory, if SRC holds none"
    )
    command.add_argument(
        "--layout", choices=("llava-hf", "llava", "llama", "peft", "peft-llava-hf"), help="default: llava-hf"
    )
    command.add_argument(
        "--only",
        choices=("projector",),
        help="DST is then a .safetensors or .bin file, or a directory that the original loads beside a base",
    )
    add_export_arguments(command)
    command.set_defaults(run=to_hf)

    command = commands.add_parser("merge-lora", help="write the model that an adapter makes of its base")
    command.add_argument(
        "base",
        metavar="BASE",
        help="the model, or the decoder alone, that was trained on; a run directory of ours holds both",
    )
    command.add_argument("adapter", metavar="ADAPTER", nargs="?", help="a directory with adapter_config.json")
    command.add_argument("destination", metavar="DST")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP or SigLIP directory, if BASE holds none"
    )
    command.add_argument(
        "--layout", choices=("llava_jax", "llava-hf", "llava"), default="llava_jax", help="default: llava_jax"
    )
    add_export_arguments(command)
    command.set_defaults(run=merge_lora)

    command = commands.add_parser("verify", help="exit with 1 if two models differ")
    command.add_argument("first", metavar="A")
    command.add_argument("second", metavar="B")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP or SigLIP directory, if one holds none"
    )
    command.add_argument(
        "--logits",
        action="store_true",
        help="run both in float32 on a drawn picture instead; 4 bytes of memory per parameter",
    )
    command.set_defaults(run=verify)

    command = commands.add_parser("inspect", help="layout, shapes, sizes, what is missing; reads no weights")
    command.add_argument("path", metavar="PATH")
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument(
        "--vision-tower", default="", metavar="DIR", help="a CLIP or SigLIP directory, if PATH holds none"
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
        if "debug" in arguments:
            raise
        print(f"convert_weights.py: {error}", file=sys.stderr)
        return getattr(error, "exit_code", BAD_MODEL)
    except KeyboardInterrupt:
        print("convert_weights.py: interrupted; what was written so far is removed.", file=sys.stderr)
        return INTERRUPTED


def add_export_arguments(command) -> None:
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as in SRC")
    command.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="default: 5GB"
    )


def byte_count(text: str) -> int:
    """A size like 5GB -> 5000000000. Units: KB, MB, GB and KiB, MiB, GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?)?B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write for example 5GB")
    unit = (match[2] or "").lower()
    power = " kmg".index(unit[0]) if unit else 0
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** power)


def open_source(path: str, vision_tower: str = "", needs_tower: bool = True):
    """The one place where a command opens what it was given."""
    from llava_jax.weights import open_any

    return open_any(path, vision_tower=vision_tower, needs_tower=needs_tower)


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
    if arguments.template:
        check_template(arguments.template, parser)
    if source:
        print(f"Reading {source[0]}", flush=True)
        model = open_source(source[0], arguments.vision_tower)
    else:
        print(f"Reading {arguments.vision_tower} and {arguments.language_model}", flush=True)
        model = assemble(arguments.vision_tower, arguments.language_model, arguments.seed)
    from llava_jax.convert.ours import write_model

    if arguments.template:
        model = dataclasses.replace(model, template=arguments.template)
    with progress_line(model) as progress:
        write_model(destination, model, progress=progress)
    print(f"Wrote {destination} (from {model.layout}, {len(model.names())} arrays)")


def check_template(name: str, parser) -> None:
    from llava_jax.data.templates import TEMPLATES

    if name not in TEMPLATES:
        parser.error(f"--template={name} is not known; choose one of {', '.join(TEMPLATES)}")


def assemble(vision_tower: str, language_model: str, seed: int):
    """A model of two components and a projector that is drawn."""
    from llava_jax.config import ModelConfig
    from llava_jax.convert.opening import open_parts
    from llava_jax.weights import complete

    return complete(open_parts(ModelConfig(), vision_tower=vision_tower, language_model=language_model), seed)


def to_hf(arguments, parser) -> None:
    if arguments.only and arguments.layout not in (None, "llava"):
        parser.error(
            f"--only=projector writes the original's files, the layout {arguments.layout} has none for it"
        )
    print(f"Reading {arguments.source}", flush=True)
    if arguments.layout in ("peft", "peft-llava-hf"):
        export_adapter(arguments)
        return
    model = open_source(arguments.source, arguments.vision_tower, needs_tower=not arguments.only)
    if arguments.only:
        from llava_jax.convert.projector_file import write_projector

        write_projector(arguments.destination, model, dtype=arguments.dtype)
        print(f"Wrote {arguments.destination} (projector)")
        return
    export(arguments, model, arguments.layout or "llava-hf")


def export_adapter(arguments) -> None:
    from llava_jax.convert.adapter_export import write_adapter
    from llava_jax.run_adapter import open_run_adapter

    adapter = open_run_adapter(Path(arguments.source))
    if not adapter.base:
        print("The run drew its decoder from its seed (no init.model), so adapter_config.json names no base.")
    write_adapter(arguments.destination, adapter, layout=arguments.layout, dtype=arguments.dtype)
    print(f"Wrote {arguments.destination} ({arguments.layout}, {len(adapter.low_rank)} arrays with LoRA)")


def export(arguments, model, layout: str) -> None:
    from llava_jax.config import ModelConfig
    from llava_jax.convert.errors import ConversionError
    from llava_jax.convert.export import write_hf

    if not isinstance(model.config, ModelConfig):
        raise ConversionError(
            f"{arguments.source} is only a component (layout {model.layout}), no whole LLaVA."
        )
    with progress_line(model) as progress:
        write_hf(
            arguments.destination,
            layout=layout,
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
    print(f"Wrote {arguments.destination} ({layout})")


def merge_lora(arguments, parser) -> None:
    if arguments.dtype and arguments.layout == "llava_jax":
        parser.error("--dtype is for the layouts llava-hf and llava; a llava_jax directory keeps the base's")
    if arguments.adapter is None:
        write_merged(arguments, merged_run(arguments.base), "run")
        return
    from llava_jax.convert.adapters import open_adapter
    from llava_jax.convert.download import fetch
    from llava_jax.convert.merging import describe_changes, merge

    print(f"Reading {arguments.base} and {arguments.adapter}", flush=True)
    adapter = open_adapter(fetch(arguments.adapter))
    base = open_source(arguments.base, arguments.vision_tower)
    if Path(arguments.base).resolve() == Path(arguments.adapter).resolve():
        model = base  # components with their adapter beside them, which are opened merged
    else:
        model = merge(base, adapter, vision_tower=arguments.vision_tower)
    print("\n".join(describe_changes(adapter)), flush=True)
    write_merged(arguments, model, base.layout)


def merged_run(path: str):
    """The model that a run by LoRA ended with."""
    from llava_jax.convert.errors import ConversionError
    from llava_jax.tuning import lora_targets
    from llava_jax.weights import open_run, run_stages

    print(f"Reading {path}", flush=True)
    if not lora_targets(next(reversed(run_stages(Path(path)).values()))):
        raise ConversionError(
            f"No module of the last stage of {path} trains by LoRA, so there is nothing to merge; from-hf {path} DST writes "
            "the model."
        )
    return open_run(Path(path))


def write_merged(arguments, model, origin: str) -> None:
    if arguments.layout != "llava_jax":
        export(arguments, model, arguments.layout)
        return
    from llava_jax.convert.ours import write_model

    with progress_line(model) as progress:
        write_model(arguments.destination, model, progress=progress)
    print(f"Wrote {arguments.destination} (from {origin} and LoRA, {len(model.names())} arrays)")


def verify(arguments, parser) -> int:
    print(f"Comparing {arguments.first} and {arguments.second}", flush=True)
    sources = [open_source(path, arguments.vision_tower) for path in (arguments.first, arguments.second)]
    return verify_logits(*sources) if arguments.logits else verify_tensors(*sources)


def verify_tensors(first, second) -> int:
    from llava_jax.convert.comparison import compare

    count = different = 0
    with progress_line(first) as progress:
        for difference in compare(first, second, progress=progress):
            count += 1
            different += not difference.equal
            verdict = "equal    " if difference.equal else "DIFFERENT"
            progress.clear()
            print(f"{verdict} {difference.name}: {difference.detail}", flush=True)
    print(f"{count - different} equal, {different} different")
    return 1 if different else 0


def verify_logits(first, second) -> int:
    from llava_jax.convert.logits import compare_logits

    difference = compare_logits(first, second)
    print(f"{'equal    ' if difference.equal else 'DIFFERENT'} logits: {difference}")
    return 0 if difference.equal else 1


def inspect(arguments, parser) -> None:
    from llava_jax.convert.description import describe

    description = describe(open_unchecked(arguments.path, arguments.vision_tower))
    print(json.dumps(description.as_json()) if arguments.json else description.as_text())


def open_unchecked(path: str, vision_tower: str):
    """What `inspect` looks at: of foreign files only the headers, whether they fit together or not."""
    from llava_jax.convert.layouts import config_fields
    from llava_jax.convert.opening import read_model

    if "format" in config_fields(Path(path)):  # a directory of our own, perhaps of a run
        return open_source(path, vision_tower)
    return read_model(path, vision_tower=vision_tower)


if __name__ == "__main__":
    sys.exit(main())
