"""The adapter that a run by LoRA trained, as it is written for PEFT."""

from pathlib import Path

from llava_jax.config import Config, ConfigError, ModelConfig, split_names
from llava_jax.convert.adapter_export import TrainedAdapter, refuse_vocabulary
from llava_jax.convert.adapters import open_adapter
from llava_jax.convert.export import check_layout
from llava_jax.convert.names import model_rows
from llava_jax.convert.source import ModelSource
from llava_jax.starting_adapters import split_adapters
from llava_jax.tuned_weights import own_name, restored, tuned
from llava_jax.tuning import LORA_A, LORA_B, is_trainable, lora_targets, module_of
from llava_jax.weights import (
    after_stage,
    as_trained,
    checkpoint_directory,
    initial_weights,
    open_any,
    run_stages,
)


def open_run_adapter(workdir: Path) -> TrainedAdapter:
    """What a run whose last stage trained by LoRA did to the model that `init` names; nothing is read yet.

    What earlier stages trained counts as trained whole, and so does the projector where the base has none or another.
    Raises ConfigError for a run without LoRA at its end, CheckpointError as `open_run` does.
    """
    workdir = workdir.expanduser()
    stages = run_stages(workdir)
    *earlier, last = stages
    config = stages[last]
    check_adapter(stages)
    weights = initial_weights(next(iter(stages.values())))
    replaced = _replaced_before(stages, weights)
    for name in earlier:
        replaced |= {own_name(n) for n in _trained_names(weights, stages[name])}
        weights = after_stage(weights, stages[name], checkpoint_directory(workdir, name), verify=True)
    found = as_trained(weights, config, checkpoint_directory(workdir, last), verify=True)
    trained = {own_name(n) for n in _trained_names(weights, config) if not n.endswith((LORA_A, LORA_B))}
    final = restored(found, config)
    low_rank = {
        own_name(name): (leaf, found.leaves[f"{name.removesuffix(LORA_A)}{LORA_B}"])
        for name, leaf in found.leaves.items()
        if name.endswith(f".{LORA_A}")
    }
    return TrainedAdapter(
        model=weights.config,
        lora=config.lora,
        base=config.init.model or config.init.language_model,
        low_rank=low_rank,
        # Of a layer with LoRA it is the kernel below that an earlier stage trained.
        replaced={n: (weights if n in low_rank else final).leaves[n] for n in replaced | trained},
        template=config.data.template,
        image_aspect_ratio=config.data.image_aspect_ratio,
    )


def check_adapter(stages: dict[str, Config], layout: str = "") -> None:
    """Raises ConfigError if a run of these stages has no adapter to write, ConversionError if `layout` cannot hold it."""
    first, last = next(iter(stages.values())), next(reversed(stages.values()))
    if not lora_targets(last):
        raise ConfigError(
            "No module of the run's last stage trains by LoRA, so there is no adapter to write; choose the layout llava-hf "
            "or llava, or set tune.language_model='lora'."
        )
    merged, _ = split_adapters(first)
    if merged:
        raise ConfigError(
            f"The run started from a base with the adapters {', '.join(merged)} merged, and that model is saved nowhere, so "
            "an adapter could not name its base; choose the layout llava-hf or llava."
        )
    if first.model.extra_tokens and not _base_has_tokens(first):
        raise ConfigError(
            f"The model's vocabulary has {', '.join(first.model.extra_tokens)} (model.use_im_start_end, "
            "model.use_im_patch_token), whose rows an adapter does not hold; choose the layout llava-hf or llava."
        )
    if layout == "peft":
        check_layout(last.model, "llava")
    vocabulary = {"embed_tokens", "lm_head"} & set(split_names(last.tune.language_model_modules))
    if layout == "peft-llava-hf" and vocabulary:
        refuse_vocabulary()


def _base_has_tokens(config: Config) -> bool:
    if not config.init.model:
        return False
    base = open_any(config.init.model).config
    return isinstance(base, ModelConfig) and set(base.extra_tokens) >= set(config.model.extra_tokens)


def _replaced_before(stages: dict[str, Config], weights: ModelSource) -> set[str]:
    """What is not as in the base even before anything was trained."""
    first = next(iter(stages.values()))
    _, continued = split_adapters(first)
    fresh = any(config.tune.fresh_projector for config in stages.values())
    has_projector = first.init.model and not first.init.projector and not fresh
    replaced = set() if has_projector else {name for name in weights.names() if _is_projector(name)}
    if continued:
        tensors = open_adapter(continued).replaced
        replaced |= {row.leaf for row in model_rows(weights.config) if tensors.keys() & set(row.tensors)}
    return replaced


def _is_projector(name: str) -> bool:
    return module_of(name) == "projector"


def _trained_names(weights: ModelSource, config: Config) -> list[str]:
    """What trains in a stage, under the names of the trained form."""
    return [name for name in tuned(weights, config).names() if is_trainable(name, config)]
