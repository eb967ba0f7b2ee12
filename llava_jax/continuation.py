"""What a checkpoint says of the run that made it, and what a stage that continues from it must have in common."""

import json
from collections.abc import Mapping
from pathlib import Path

from llava_jax.checkpoint import read_meta, step_of, what_prevents_training
from llava_jax.config import Config
from llava_jax.config_values import to_json
from llava_jax.data.pipeline import Pipeline
from llava_jax.errors import CheckpointError
from llava_jax.run_directory import flatten

_NETWORK = (
    "model",
    "lora",
)  # sections that say what parameters mean; others may differ from the run that made them


def facts(config: Config, data: Pipeline, checksums: dict[str, int], evaluated: dict) -> dict:
    """What is written beside each state of a stage.

    checksums: of the frozen parameters, by name. evaluated: as `evaluated_sets` gives it.
    """
    network = {section: to_json(getattr(config, section)) for section in _NETWORK}
    return {
        "dataset": data.fingerprint,
        "frozen": checksums,
        "network": flatten({"": json.loads(json.dumps(network))}),
        "evaluation": evaluated,
    }


def require_same(start: Path, expected: dict) -> None:
    """Raises CheckpointError if the checkpoint `start` was made with other `facts`."""
    found = read_meta(start)
    if found["dataset"] != expected["dataset"]:
        raise CheckpointError(
            f"{start} was trained on other data: the records, the sizes or presence of their images, the tokenizer or "
            "the data settings have changed since. Restore them, or start anew with another --workdir."
        )
    before, now = found.get("network", {}), expected["network"]  # older checkpoints do not tell
    differing = [key for key in sorted(before.keys() & now.keys()) if before[key] != now[key]]
    if differing:
        listed = ", ".join(f"{key.removeprefix('/')}={now[key]!r} (was {before[key]!r})" for key in differing)
        raise CheckpointError(
            f"{start} is of another network: {listed}. Use its settings, or start a new run from it with init.model."
        )
    changed = [name for name, crc in expected["frozen"].items() if found["frozen"].get(name) != crc]
    if changed:
        raise CheckpointError(
            f"{start} was trained with other frozen weights: {changed[0]} and {len(changed) - 1} more have changed since. "
            "Put back what init.* names, or start anew with another --workdir."
        )


def evaluated_sets(evaluations: Mapping[str, Pipeline], start: Path | None) -> dict:
    """The fingerprints of what a stage is evaluated on, and the step since which it is: figures of other data are no
    measure. start: the checkpoint that it continues from."""
    sets = {name: data.fingerprint for name, data in evaluations.items()}
    found = start and read_meta(start).get("evaluation")
    if not found or found["sets"] == sets:
        return {"sets": sets, "since": found["since"] if found else 0}
    step = step_of(start)
    print(
        f"The evaluation sets have changed: evaluations up to step {step:,} do not count any more.",
        flush=True,
    )
    return {"sets": sets, "since": step}


def require_training_state(start: Path) -> None:
    """Raises CheckpointError for the end of a stage that stopped early, but would now go on."""
    if obstacle := what_prevents_training(read_meta(start)):
        raise CheckpointError(
            f"{start} {obstacle}; evaluation sets or metrics.jsonl have changed since, so that the stage would go on. Put "
            "them back, train further in a new run with init.model, or start anew with "
            "checkpoint.overwrite_output_dir=True."
        )
