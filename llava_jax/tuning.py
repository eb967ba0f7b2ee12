"""What trains: which parameters of each module, in which form, at which rate and decay."""

import difflib
import itertools
import math
from collections.abc import Mapping

from llava_jax.config import (
    CLIP,
    Config,
    ConfigError,
    ModelConfig,
    OptimizerConfig,
    TextConfig,
    layer_range,
    one_of,
    require,
    split_names,
)

MODULES = {  # the first part of a parameter's name -> the module's name in the config
    "vision_tower": "vision_tower",
    "multi_modal_projector": "projector",
    "language_model": "language_model",
}
PREFIXES = {module: prefix for prefix, module in MODULES.items()}
# A LoRA pair, float32 [in, rank] and [rank, out], beside the kernel that it adapts; stacked as that is.
LORA_A, LORA_B = "lora_a", "lora_b"
NF4_BLOCK = 64  # inputs with a common scale, as in bitsandbytes

_VISION_LINEARS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
# What the original adapts (find_all_linear_names in llava/train/train.py).
_TEXT_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def module_of(name: str) -> str:
    """The module that the parameter of this name belongs to."""
    return MODULES[name.partition(".")[0]]


def kernel_name(name: str) -> str:
    """The kernel that a leaf of a quantised one belongs to: "q_proj.kernel.nf4" -> "q_proj.kernel". Others as they are."""
    kernel, dot, _ = name.partition(".kernel.")
    return f"{kernel}.kernel" if dot else name


def num_parameters(name: str, shape: tuple[int, ...]) -> int:
    """How many of the model's parameters a leaf holds: two in each byte of nf4, none in what scales a kernel."""
    if kernel_name(name) == name or name.endswith(".int8"):
        return math.prod(shape)
    return 2 * math.prod(shape) if name.endswith(".nf4") else 0


def is_trainable(name: str, config: Config) -> bool:
    """Whether the parameter of this name trains. The one filter for gradients, moments and checkpoints."""
    module = module_of(name)
    mode = getattr(config.tune, module)
    if mode in ("frozen", "full"):
        return mode == "full"
    _, part, *rest = name.split(".")
    if part in split_names(getattr(config.tune, f"{module}_modules", "")):
        return True
    if mode == "partial":
        return _in_chosen_layers(part, rest, module, config)
    layer, kind = name.split(".")[-2:]
    if kind == "bias":
        adapted = layer in lora_targets(config)[module]
        return config.lora.bias == "all" or (config.lora.bias == "lora_only" and adapted)
    return kind in (LORA_A, LORA_B)


def _in_chosen_layers(part: str, rest: list[str], module: str, config: Config) -> bool:
    chosen = chosen_layers(module, config)
    if chosen is None:
        return False
    if module == "projector":
        return chosen[0] <= int(part.removeprefix("linear_")) - 1 < chosen[1]
    if part != "layers":
        return False
    # Of a stack that is cut, the name says which layers it holds.
    return rest[0] == span_name(chosen) or chosen == (0, num_layers(module, config.model))


def chosen_layers(module: str, config: Config) -> tuple[int, int] | None:
    """The range of layers that "partial" trains of a module; None if it has no such range."""
    text = getattr(config.tune, f"{module}_layers")
    if not text:
        return None
    return layer_range(f"tune.{module}_layers", text, num_layers(module, config.model))


def num_layers(module: str, model: ModelConfig) -> int:
    """How many layers of a module are run."""
    return {
        "vision_tower": model.num_vision_layers_run,
        "projector": model.projector_depth,
        "language_model": model.text.num_hidden_layers,
    }[module]


def layer_spans(config: Config) -> dict[str, tuple[tuple[int, int], ...]]:
    """Into which ranges of layers a module's stack is cut so that one of them trains; no entry if it stays whole."""
    spans = {}
    for module in ("vision_tower", "language_model"):
        chosen = chosen_layers(module, config)
        if chosen is not None:
            ends = (0, *chosen, num_layers(module, config.model))
            parts = tuple(pair for pair in itertools.pairwise(ends) if pair[0] < pair[1])
            if len(parts) > 1:
                spans[module] = parts
    return spans


def span_name(span: tuple[int, int]) -> str:
    """(28, 32) -> "28:32", the part of a parameter's name."""
    return f"{span[0]}:{span[1]}"


def linear_layers(module: str, model: ModelConfig) -> tuple[str, ...]:
    """The names of a module's linear layers, those that "all" adapts; the head is none of them."""
    if module == "projector":
        return tuple(f"linear_{i}" for i in range(1, model.projector_depth + 1))
    if module == "language_model":
        return _TEXT_LINEARS
    return _VISION_LINEARS if model.num_vision_layers_run else ()


def lora_targets(config: Config) -> dict[str, tuple[str, ...]]:
    """The names of the linear layers that LoRA adapts, for each module whose mode is "lora".

    Raises ConfigError where a setting names nothing, or what is in a module without LoRA.
    """
    modules = [module for module in PREFIXES if getattr(config.tune, module) == "lora"]
    targets, shared = {}, set()
    for module in modules:
        key, text = config.lora.target_of(module)
        known = linear_layers(module, config.model)
        asked = known if text == "all" else split_names(text)
        if key == "lora.target":
            shared |= set(known)
        else:
            for name in asked:
                one_of(key, name, known)
        targets[module] = tuple(name for name in known if name in asked)
        near = [own for name in split_names(text) for own in difflib.get_close_matches(name, known, n=1)]
        hint = f" Did you mean {','.join(near)!r}?" if near else ""
        require(
            targets[module],
            f"tune.{module}='lora', but {key}={text!r} names none of its linear layers "
            f"({', '.join(known) or 'it has none'}); set lora.{module}_target, or tune.{module} to another mode.{hint}",
        )
    for module in PREFIXES:
        require(
            module in modules or getattr(config.lora, f"{module}_target") is None,
            f"lora.{module}_target is set, but tune.{module}={getattr(config.tune, module)!r}; "
            "set that to 'lora' or drop one.",
        )
    if shared and config.lora.target != "all":
        for name in split_names(config.lora.target):
            _require_known(name, shared, config)
    return targets


def _require_known(name: str, known: set[str], config: Config) -> None:
    """Raises ConfigError, saying where the layer is, if lora.target names one that no adapted module has."""
    if name in known:
        return
    for module in PREFIXES:
        if name in linear_layers(module, config.model):
            raise ConfigError(
                f"lora.target names {name}, a layer of the {module.replace('_', ' ')}, but tune.{module}="
                f"{getattr(config.tune, module)!r}; set that to 'lora', or drop the name."
            )
    one_of("lora.target", name, tuple(sorted(known)))


def check(config: Config) -> None:
    """Raises ConfigError when the settings of what trains do not fit the model."""
    lora_targets(config)
    for module in PREFIXES:
        chosen_layers(module, config)
    check_blocks("lora.quantization", config.lora.quantization, config.model.text)
    for name in split_names(config.tune.vision_tower_modules):
        require(
            config.model.vision.model_type == CLIP or name not in ("class_embedding", "pre_layrnorm"),
            f"tune.vision_tower_modules names {name}, which SigLIP does not have; drop it.",
        )
    names = split_names(config.tune.language_model_modules)
    require(
        "lm_head" not in names or not config.model.text.tie_word_embeddings,
        "tune.language_model_modules names lm_head, but this decoder's head is its embedding; name embed_tokens.",
    )
    require(
        "image_newline" not in names or config.model.patch_merge_type == "spatial_unpad",
        "tune.language_model_modules names image_newline, which only a model with "
        "model.patch_merge_type='spatial_unpad' has; drop it.",
    )


def only_images_reach(config: Config) -> bool:
    """Whether text alone gives no gradient to anything that trains."""
    tune = config.tune
    newline_alone = tune.language_model == "partial" and not tune.language_model_layers
    newline_alone = newline_alone and split_names(tune.language_model_modules) == ("image_newline",)
    return not tune.trains("language_model") or newline_alone


def check_images(config: Config, num_images: int) -> None:
    """Raises ConfigError if only what images pass through trains, on data that has none."""
    modules = [module for module in PREFIXES if config.tune.trains(module)]
    require(
        num_images > 0 or not only_images_reach(config),
        f"No sample has an image, so that nothing would reach what trains ({' and '.join(modules)}) and every gradient "
        "would be 0: name data with images, or set tune.language_model='full'.",
    )


def check_blocks(key: str, quantization: str, text: TextConfig) -> None:
    """Raises ConfigError, naming the setting, if it asks for blocks that the decoder's kernels cannot be cut into."""
    for width, inputs in {
        "hidden_size": text.hidden_size,
        "num_attention_heads * head_dim": text.num_attention_heads * text.head_dim,
        "intermediate_size": text.intermediate_size,
    }.items():
        require(
            quantization != "nf4" or inputs % NF4_BLOCK == 0,
            f"{key}='nf4' scales kernels by blocks of {NF4_BLOCK} inputs, but model.text.{width} = {inputs} is no "
            f"multiple of that; set {key}='int8'.",
        )


def learning_rates(config: OptimizerConfig) -> dict[str, float]:
    """Each module's peak learning rate."""
    return {module: _own(config, module, "learning_rate") for module in PREFIXES}


def weight_decays(config: OptimizerConfig) -> dict[str, float]:
    """Each module's weight decay."""
    return {module: _own(config, module, "weight_decay") for module in PREFIXES}


def _own(config: OptimizerConfig, module: str, key: str) -> float:
    own = getattr(config, f"{module}_{key}")
    return getattr(config, key) if own is None else own


def table(config: Config, trainable: Mapping, frozen: Mapping) -> list[str]:
    """A line per module: its parameters, how many of them train, in which form, at which rate.

    trainable, frozen: the stage's parameters by name, of anything with a shape.
    """
    rates, decays = learning_rates(config.optimizer), weight_decays(config.optimizer)
    lines = []
    for module in PREFIXES:
        trained, kept = (
            sum(num_parameters(name, leaf.shape) for name, leaf in some.items() if module_of(name) == module)
            for some in (trainable, frozen)
        )
        line = f"{module:<15} {trained + kept:>15,} parameters  "
        if trained:
            line += f"{trained:>15,} train at {rates[module]:g}"
            line += f", weight decay {decays[module]:g}" if decays[module] else ""
            line += f": {described_form(module, config)}"
        else:
            line += "frozen"
        lines.append(line)
    return lines


def described_form(module: str, config: Config) -> str:
    """In which form a module trains, in words."""
    mode = getattr(config.tune, module)
    whole = [*split_names(getattr(config.tune, f"{module}_modules", ""))]
    if mode == "full":
        return "full"
    if mode == "partial":
        chosen = chosen_layers(module, config)
        parts = []
        if chosen:
            parts = [f"layers {span_name(chosen)} of {num_layers(module, config.model)}"]
        return ", ".join(parts + whole)
    lora = config.lora
    text = f"LoRA of rank {lora.rank}, scale {lora.scale:g}, dropout {lora.dropout:g} on "
    text += ", ".join(lora_targets(config)[module])
    if config.optimizer.loraplus_lr_ratio != 1:
        text += f", B at {config.optimizer.loraplus_lr_ratio:g} times the rate"
    if lora.bias != "none":
        text += f"; biases: {lora.bias}"
    if module == "language_model" and lora.quantization != "none":
        text += f"; its kernels in {lora.quantization}"
    return text + (f"; whole: {', '.join(whole)}" if whole else "")
