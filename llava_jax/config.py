"""The schema of a run: frozen dataclasses whose defaults are LLaVA-1.5's published values."""

import dataclasses
import difflib
import math
import re

from llava_jax.errors import ConfigError
from llava_jax.known_names import explain_value


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with `message` unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def _positive(section: str, config, *keys: str) -> None:
    for key in keys:
        value = getattr(config, key)
        require(value > 0 and math.isfinite(value), f"{section}.{key}={value} must be a positive number.")


def one_of(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises ConfigError, with what it is called here or the nearest name, unless `value` is one of the choices."""
    if value in choices:
        return
    near = difflib.get_close_matches(value, choices, n=1)
    hint = explain_value(key, value) or (f"Did you mean {near[0]!r}?" if near else "")
    raise ConfigError(f"{key}={value!r} is not one of {', '.join(map(repr, choices))}. {hint}".rstrip())


CLIP, SIGLIP = "clip_vision_model", "siglip_vision_model"  # the kinds of towers, as HF calls them
# How they were trained to see pixels in [0, 1]: preprocessor_config.json of openai/clip-vit-large-patch14-336 and of
# google/siglip-so400m-patch14-384.
_IMAGE_MEAN = {CLIP: (0.48145466, 0.4578275, 0.40821073), SIGLIP: (0.5, 0.5, 0.5)}
_IMAGE_STD = {CLIP: (0.26862954, 0.26130258, 0.27577711), SIGLIP: (0.5, 0.5, 0.5)}


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """A vision transformer, with the names of HF's `CLIPVisionConfig` and `SiglipVisionConfig`.

    Defaults: CLIP's ViT-L/14 at 336 px.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    hidden_act: str = "quick_gelu"  # gelu, gelu_pytorch_tanh
    layer_norm_eps: float = 1e-5
    model_type: str = CLIP  # or SIGLIP

    def __post_init__(self):
        numbers = (field.name for field in dataclasses.fields(self) if field.type in (int, float))
        _positive("vision", self, *numbers)
        one_of("vision.model_type", self.model_type, (CLIP, SIGLIP))
        one_of("vision.hidden_act", self.hidden_act, ("quick_gelu", "gelu", "gelu_pytorch_tanh"))
        require(
            self.hidden_size % self.num_attention_heads == 0,
            f"vision.hidden_size={self.hidden_size} is not a multiple of "
            f"vision.num_attention_heads={self.num_attention_heads}.",
        )
        require(
            self.image_size >= self.patch_size,
            f"vision.image_size={self.image_size} holds no patch of vision.patch_size={self.patch_size}.",
        )
        require(
            self.model_type == SIGLIP or self.image_size % self.patch_size == 0,
            f"vision.image_size={self.image_size} is not a multiple of vision.patch_size={self.patch_size}.",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        """Whole patches; SigLIP leaves out the pixels beyond the last one (384 px hold 27 x 27 of 14)."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """The length of a hidden state: the patches, and CLIP's class token before them."""
        return self.num_patches + (self.model_type == CLIP)

    @property
    def image_mean(self) -> tuple[float, float, float]:
        return _IMAGE_MEAN[self.model_type]

    @property
    def image_std(self) -> tuple[float, float, float]:
        return _IMAGE_STD[self.model_type]


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched, with the names of HF's `rope_parameters`."""

    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        one_of("text.rope_scaling.rope_type", self.rope_type, ("default", "linear", "llama3"))
        numbers = (field.name for field in dataclasses.fields(self) if field.name != "rope_type")
        _positive("text.rope_scaling", self, *numbers)


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """A Llama-like decoder, with the names of HF's `LlamaConfig`. Defaults: Vicuna-7B v1.5."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    attention_bias: str = "none"  # "qkv" as in Qwen2, "qkvo" as Llama's attention_bias=true
    tie_word_embeddings: bool = False

    def __post_init__(self):
        numbers = (field.name for field in dataclasses.fields(self) if field.type in (int, float))
        _positive("text", self, *numbers)
        one_of("text.attention_bias", self.attention_bias, ("none", "qkv", "qkvo"))
        require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"text.num_attention_heads={self.num_attention_heads} is not a multiple of "
            f"text.num_key_value_heads={self.num_key_value_heads}.",
        )
        require(self.head_dim % 2 == 0, f"text.head_dim={self.head_dim} is odd; rotary positions need pairs.")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole network: which of the tower's features are read and how they reach the decoder."""

    vision: VisionConfig = VisionConfig()
    text: TextConfig = TextConfig()
    projector_type: str = "mlp2x_gelu"  # linear, identity, mlp{N}x_gelu
    select_layer: int = -2  # index into the tower's hidden states; 0 is the embeddings
    # "patch" leaves out the first feature, CLIP's class token; SigLIP, without one, loses a patch to it. cls_patch: all.
    select_feature: str = "patch"
    # Only for data.image_aspect_ratio="anyres": the sizes (width, height) that an image may be tiled to,
    # and how the features of its tiles are laid out.
    image_grid_pinpoints: tuple[tuple[int, int], ...] = ()
    patch_merge_type: str = "flat"  # spatial, spatial_unpad (cuts padding off, ends rows with image_newline)
    # Tokens that the first LLaVA adds to the decoder's own; text.vocab_size counts them.
    use_im_start_end: bool = False  # <im_start> and <im_end>, written around every image
    use_im_patch_token: bool = False  # <im_patch>, with which nothing is written

    def __post_init__(self):
        one_of("model.patch_merge_type", self.patch_merge_type, ("flat", "spatial", "spatial_unpad"))
        assert self.projector_depth >= 0  # raises on an unknown type
        one_of("model.select_feature", self.select_feature, ("patch", "cls_patch"))
        states = self.vision.num_hidden_layers + 1
        require(
            -states <= self.select_layer < states,
            f"model.select_layer={self.select_layer} is outside the tower's {states} hidden states "
            f"({-states}..{states - 1}).",
        )
        require(
            self.num_image_tokens > 0,
            f"model.select_feature={self.select_feature!r} leaves nothing of the tower's one feature; use 'cls_patch'.",
        )
        require(
            self.projector_type != "identity" or self.vision.hidden_size == self.text.hidden_size,
            f"model.projector_type='identity' needs equal widths, but vision.hidden_size="
            f"{self.vision.hidden_size} and text.hidden_size={self.text.hidden_size}.",
        )

    @property
    def projector_depth(self) -> int:
        """The number of linear layers in the projector."""
        name = self.projector_type
        if name == "identity":
            return 0
        if name == "linear":
            return 1
        layers = re.fullmatch(r"mlp([1-9][0-9]*)x_gelu", name)
        if layers:
            return int(layers[1])
        raise ConfigError(
            f"model.projector_type={name!r} is not one of 'linear', 'identity', 'mlp2x_gelu' "
            "(or another number of layers in place of 2)."
        )

    @property
    def extra_tokens(self) -> tuple[str, ...]:
        """The special tokens that are added to the decoder's own, in the original's order."""
        patch = ("<im_patch>",) if self.use_im_patch_token else ()
        return patch + (("<im_start>", "<im_end>") if self.use_im_start_end else ())

    @property
    def num_vision_layers_run(self) -> int:
        """How many of the tower's layers lie below the hidden state that is read (23 of 24 for layer -2)."""
        return self.select_layer % (self.vision.num_hidden_layers + 1)

    @property
    def num_image_tokens(self) -> int:
        """Placeholders per image in the token sequence (576 for 336 px in patches of 14)."""
        return self.vision.num_positions - (self.select_feature == "patch")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where the weights and the tokenizer come from. What no directory provides is drawn from `seed`."""

    model: str = ""  # a whole model: our directory, a run directory, llava-hf or original LLaVA
    vision_tower: str = ""  # a CLIP or SigLIP directory
    language_model: str = ""  # a Llama, Vicuna, ... directory
    projector: str = ""  # mm_projector.bin / .safetensors, or a directory or run that holds a projector
    adapters: str = (
        ""  # PEFT adapters, with commas between: merged in this order, the last trained further by LoRA
    )
    tokenizer: str = ""  # tokenizer.model, tokenizer.json or a directory; "" = beside the decoder's weights
    change_template: bool = False  # train with another data.template than the one that these have learnt

    def __post_init__(self):
        require(
            not (self.model and (self.vision_tower or self.language_model)),
            "init.model names a whole model, init.vision_tower and init.language_model its parts; set one or the other.",
        )
        require(
            self.model or self.language_model or not self.change_template,
            "init.change_template is about the template that init.model or init.language_model has learnt, but neither is "
            "named; drop it.",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes batches."""

    path: str = ""  # LLaVA JSON (a list) or JSONL; several files with commas between
    dataset: str = ""  # instead of path: names, with commas between, of dataset_dir/dataset_info.json
    dataset_dir: str = "data"
    image_folder: str = ""
    weights: tuple[float, ...] = ()  # how often each file's samples are taken per epoch; (): once
    max_samples: int | None = None  # of each file, its first
    val_size: float = 0.0  # kept out of training for evaluation: a share if below 1, else a count
    eval_path: str = ""  # or files of their own to evaluate on; NAME=FILE,NAME=FILE are sets told apart
    eval_dataset: str = ""  # or names of dataset_info.json; NAME=DATASET,NAME=DATASET are sets told apart
    on_bad_sample: str = "error"  # or "skip": another takes its place, and the run tells which
    max_bad_share: float = 0.01  # with "skip", more bad samples than this are an error

    template: str = "v1"
    mask: str = "assistant"  # what is learnt: assistant, last_answer, everything, original
    max_length: int = 2048  # tokens per sample, image placeholders included
    too_long: str = "truncate"  # or "error"

    image_aspect_ratio: str = "pad"  # pad, square, anyres
    image_max_pixels: int | None = None  # larger images are shrunk to this area first
    image_min_pixels: int | None = None
    video_frames: int = 8  # of a video, evenly spread
    video_max_pixels: int | None = None  # per frame
    fast_decode: bool = False  # shrinks JPEGs while decoding; pixels then differ a little

    batch_size: int = 128  # rows per optimizer step, over all devices and accumulation
    shuffle: bool = True
    group_by_modality_length: bool = False  # a step holds samples with or without images, alike in length
    packing: bool = False  # several samples per row, isolated from each other
    row_length: int | None = None  # tokens per packed row; None: 4 x max_length
    max_images_per_row: int | None = None  # image slots of a packed row; None: what the data needs

    num_threads: int = 16  # reading and resizing images
    cache_dir: str = "~/.cache/llava_jax"  # where measured lengths are kept; "": nowhere
    overwrite_cache: bool = False

    def __post_init__(self):
        require(
            not (self.path and self.dataset),
            f"data.path={self.path!r} and data.dataset={self.dataset!r} both say what to read; set one.",
        )
        held_out = {key: getattr(self, key) for key in ("val_size", "eval_path", "eval_dataset")}
        given = [f"data.{key}={value!r}" for key, value in held_out.items() if value]
        require(len(given) < 2, f"{' and '.join(given)} say what to evaluate on; set one.")
        require(
            0 <= self.val_size < math.inf and (self.val_size < 1 or self.val_size == int(self.val_size)),
            f"data.val_size={self.val_size:g} must be a share below 1 or a whole number of samples.",
        )
        require(
            all(0 < weight <= 1000 for weight in self.weights),
            f"data.weights={self.weights} must be positive.",
        )
        one_of("data.on_bad_sample", self.on_bad_sample, ("error", "skip"))
        one_of("data.mask", self.mask, ("assistant", "last_answer", "everything", "original"))
        one_of("data.image_aspect_ratio", self.image_aspect_ratio, ("pad", "square", "anyres"))
        one_of("data.too_long", self.too_long, ("truncate", "error"))
        require(0 <= self.max_bad_share <= 1, f"data.max_bad_share={self.max_bad_share} is a share: 0 to 1.")
        _positive("data", self, "batch_size", "video_frames")
        for key in (
            "max_samples",
            "image_max_pixels",
            "image_min_pixels",
            "video_max_pixels",
            "max_images_per_row",
        ):
            if getattr(self, key) is not None:
                _positive("data", self, key)
        require(
            not (self.image_min_pixels and self.image_max_pixels)
            or self.image_min_pixels <= self.image_max_pixels,
            f"data.image_min_pixels={self.image_min_pixels} exceeds data.image_max_pixels={self.image_max_pixels}.",
        )
        require(self.max_length > 1, f"data.max_length={self.max_length} must be at least 2.")
        require(
            not (self.packing and self.group_by_modality_length),
            "data.packing mixes samples within a row, data.group_by_modality_length keeps them apart; set one.",
        )
        require(
            self.shuffle or not (self.packing or self.group_by_modality_length),
            "data.shuffle=False keeps the order of the file, which data.packing and data.group_by_modality_length change; "
            "set one of them.",
        )
        require(
            self.packing or (self.row_length is None and self.max_images_per_row is None),
            "data.row_length and data.max_images_per_row are about packed rows; set data.packing=True.",
        )
        require(
            self.row_length is None or self.row_length >= self.max_length,
            f"data.row_length={self.row_length} must hold the longest sample, data.max_length={self.max_length}.",
        )
        require(self.num_threads >= 0, f"data.num_threads={self.num_threads} must not be negative.")

    @property
    def evaluates(self) -> bool:
        """Whether anything is kept out of training to evaluate on."""
        return bool(self.val_size or self.eval_path or self.eval_dataset)


def refuse_switch(key: str, value) -> None:
    """Raises ConfigError with the word to write if a module's mode is a boolean, which it once was."""
    require(
        str(value) not in ("True", "False"),
        f"{key}={value} should be a word: {'full' if str(value) == 'True' else 'frozen'!r} in its place "
        "(or 'partial' or 'lora').",
    )


TUNE_MODES = ("frozen", "full", "partial", "lora")


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """How each module trains. What does not train gets no gradient, no moments and no place in checkpoints.

    Layers are a slice as Python writes it: "20:" from layer 20 on, ":2" the first two, "-4:" the last four; of
    the tower only the layers that are run count. Modules are names with commas between, such as "lm_head,norm".
    """

    vision_tower: str = "frozen"  # frozen, full, partial (what the settings below name), lora
    projector: str = "full"
    language_model: str = "full"
    vision_tower_layers: str = ""  # with "partial"
    projector_layers: str = ""
    language_model_layers: str = ""
    vision_tower_modules: str = ""  # with "partial" or "lora", trained whole: VISION_MODULES
    language_model_modules: str = ""  # TEXT_MODULES
    fresh_projector: bool = False  # throw away what was loaded or trained before and draw a new one

    def __post_init__(self):
        for module in ("vision_tower", "projector", "language_model"):
            key, mode = f"tune.{module}", getattr(self, module)
            refuse_switch(key, mode)
            one_of(key, mode, TUNE_MODES)
            layers, modules = getattr(self, f"{module}_layers"), getattr(self, f"{module}_modules", "")
            require(
                mode == "partial" or not layers,
                f"{key}_layers={layers!r} is about {key}='partial', but it is {mode!r}; change one of them.",
            )
            require(
                mode in ("partial", "lora") or not modules,
                f"{key}_modules={modules!r} is about {key}='partial' or 'lora', but it is {mode!r}; change one of them.",
            )
            require(
                mode != "partial" or layers or modules,
                f"{key}='partial' says not which part: set {key}_layers, for example '-4:' for the last four.",
            )
        for name in split_names(self.vision_tower_modules):
            one_of("tune.vision_tower_modules", name, VISION_MODULES)
        for name in split_names(self.language_model_modules):
            one_of("tune.language_model_modules", name, TEXT_MODULES)
        require(
            any(self.trains(module) for module in ("vision_tower", "projector", "language_model")),
            "Nothing trains: set tune.projector, tune.language_model or tune.vision_tower to 'full', 'partial' or 'lora'.",
        )

    def trains(self, module: str) -> bool:
        """Whether anything of the module trains."""
        return getattr(self, module) != "frozen"


# What a tower and a decoder hold beside their layers.
VISION_MODULES = ("class_embedding", "patch_embedding", "position_embedding", "pre_layrnorm")
TEXT_MODULES = ("embed_tokens", "norm", "lm_head", "image_newline")


def split_names(text: str) -> tuple[str, ...]:
    """ "a, b" -> ("a", "b")."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def layer_range(key: str, text: str, num_layers: int) -> tuple[int, int]:
    """The first layer that a slice selects and the one after its last. Raises ConfigError if it selects none."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", text.strip())
    require(
        match is not None,
        f"{key}={text!r} is no slice; write '20:' for from layer 20 on, ':2' for the first two, '-4:' for the last four.",
    )
    ends = [
        default if end is None else int(end)
        for end, default in zip(match.groups(), (0, num_layers), strict=True)
    ]
    begin, end = (end + num_layers if end < 0 else end for end in ends)
    require(
        0 <= begin < end <= num_layers,
        f"{key}={text!r} selects no layers, or more than there are: the module has {num_layers} (0 to {num_layers - 1}).",
    )
    return begin, end


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters in the modules whose mode is "lora": y = x W + scale * dropout(x) A B, where W is frozen."""

    rank: int = 128
    alpha: float | None = None  # scale = alpha / rank; None: 2 * rank, as the original's 256 for 128
    dropout: float = 0.05
    target: str = "all"  # linear layers by name, with commas between; "all": every one but the head
    vision_tower_target: str | None = None  # where a module should have others; None: target
    projector_target: str | None = None
    language_model_target: str | None = None
    bias: str = "none"  # which biases train too: none, all (of the module), lora_only (of the adapted layers)
    create_new_adapter: bool = False  # merge the last of init.adapters too, and train a new one
    rslora: bool = False  # scale = alpha / sqrt(rank), https://arxiv.org/abs/2312.03732
    # In what the decoder's linear layers are kept (QLoRA, https://arxiv.org/abs/2305.14314): none, int8, nf4.
    quantization: str = "none"
    double_quantization: bool = True  # of nf4, its scales too

    def __post_init__(self):
        require(self.rank > 0, f"lora.rank={self.rank} must be positive.")
        if self.alpha is not None:
            _positive("lora", self, "alpha")
        require(0 <= self.dropout < 1, f"lora.dropout={self.dropout} must lie in 0 to 1, 1 excluded.")
        one_of("lora.bias", self.bias, ("none", "all", "lora_only"))
        one_of("lora.quantization", self.quantization, ("none", "int8", "nf4"))
        require(
            self.double_quantization or self.quantization == "nf4",
            f"lora.double_quantization=False is about lora.quantization='nf4', but it is {self.quantization!r}; drop one.",
        )

    @property
    def effective_alpha(self) -> float:
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @property
    def scale(self) -> float:
        return self.effective_alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def target_of(self, module: str) -> tuple[str, str]:
        """The setting that says what is adapted in a module, and its value."""
        own = getattr(self, f"{module}_target")
        return ("lora.target", self.target) if own is None else (f"lora.{module}_target", own)


# Which settings an optimizer and a schedule read that not all of them do.
OPTIMIZERS = {
    "adamw": ("beta1", "beta2", "epsilon", "moment_dtype"),
    "adamw_8bit": ("beta1", "beta2", "epsilon"),
    "adafactor": (),
    "lion": ("beta1", "beta2", "moment_dtype"),
    "muon": ("beta1", "beta2", "epsilon", "momentum", "moment_dtype"),
    "sgd": ("momentum", "moment_dtype"),
}
SCHEDULES = {
    "cosine": ("warmup_ratio", "warmup_steps"),
    "cosine_with_min_lr": ("warmup_ratio", "warmup_steps", "min_lr_ratio"),
    "linear": ("warmup_ratio", "warmup_steps"),
    "constant": (),
    "constant_with_warmup": ("warmup_ratio", "warmup_steps"),
    "inverse_sqrt": ("warmup_ratio", "warmup_steps"),
    "warmup_stable_decay": ("warmup_ratio", "warmup_steps", "min_lr_ratio", "decay_ratio"),
}


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the original's decay groups, under one schedule, or another optimizer with the same groups."""

    name: str = "adamw"  # adafactor, lion, muon, sgd, adamw_8bit
    learning_rate: float = 2e-5
    vision_tower_learning_rate: float | None = None  # None: learning_rate
    projector_learning_rate: float | None = None
    language_model_learning_rate: float | None = None
    loraplus_lr_ratio: float = 1.0  # LoRA's B learns faster than its A, https://arxiv.org/abs/2402.12354
    schedule: str = "cosine"  # SCHEDULES, with the Hugging Face trainer's names and values
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None  # overrides warmup_ratio
    min_lr_ratio: float = 0.0  # where cosine_with_min_lr and warmup_stable_decay end, as a share of the peak
    decay_ratio: float = 0.1  # of warmup_stable_decay: the share of the run in which the rate falls
    beta1: float = 0.9
    beta2: float | None = None  # None: 0.999, of Lion 0.99
    epsilon: float = 1e-8
    momentum: float | None = None  # None: of Muon 0.95, of SGD none
    moment_dtype: str = "float32"  # bfloat16 halves the memory of moments
    ema_decay: float | None = None  # keeps an average of the trained parameters; None: does not
    weight_decay: float = 0.0
    vision_tower_weight_decay: float | None = None  # None: weight_decay
    projector_weight_decay: float | None = None
    language_model_weight_decay: float | None = None
    # The original asks for 1.0 but its DeepSpeed files switch clipping off; None is what it really did.
    max_grad_norm: float | None = None

    def __post_init__(self):
        one_of("optimizer.name", self.name, tuple(OPTIMIZERS))
        one_of("optimizer.schedule", self.schedule, tuple(SCHEDULES))
        one_of("optimizer.moment_dtype", self.moment_dtype, ("float32", "bfloat16"))
        modules = ("vision_tower", "projector", "language_model")
        rates = ("learning_rate", *(f"{module}_learning_rate" for module in modules))
        for key in (*rates, "loraplus_lr_ratio", "epsilon"):
            if getattr(self, key) is not None:
                _positive("optimizer", self, key)
        for key in ("beta1", "beta2", "momentum", "ema_decay", "min_lr_ratio"):
            value = getattr(self, key)
            require(
                value is None or 0 <= value < 1, f"optimizer.{key}={value} must lie in 0 to 1, 1 excluded."
            )
        for key in ("weight_decay", *(f"{module}_weight_decay" for module in modules)):
            value = getattr(self, key)
            require(value is None or 0 <= value < math.inf, f"optimizer.{key}={value} must not be negative.")
        require(
            0 <= self.warmup_ratio <= 1,
            f"optimizer.warmup_ratio={self.warmup_ratio} is a share of the run: 0 to 1.",
        )
        require(
            self.warmup_steps is None or 0 <= self.warmup_steps < 2**31,
            f"optimizer.warmup_steps={self.warmup_steps} is no number of steps: 0 or more, below 2^31.",
        )
        require(
            0 < self.decay_ratio <= 1,
            f"optimizer.decay_ratio={self.decay_ratio} is a share of the run above 0, at most 1.",
        )
        self._check_all_is_read("name", OPTIMIZERS)
        self._check_all_is_read("schedule", SCHEDULES)
        require(
            self.max_grad_norm is None or 0 < self.max_grad_norm < math.inf,
            f"optimizer.max_grad_norm={self.max_grad_norm} must be positive and finite; None switches clipping off.",
        )

    def _check_all_is_read(self, choice: str, readers: dict[str, tuple[str, ...]]) -> None:
        """Raises ConfigError if a setting is changed that this choice does not read, but another one does."""
        value = getattr(self, choice)
        for key in dict.fromkeys(key for keys in readers.values() for key in keys):
            users = ", ".join(name for name, keys in readers.items() if key in keys)
            require(
                key in readers[value] or getattr(self, key) in (getattr(OptimizerConfig, key), 0),
                f"optimizer.{key}={getattr(self, key)} reaches nothing with optimizer.{choice}={value!r}; drop it, "
                f"or choose one of {users}.",
            )
        require(
            choice != "name" or self.name != "sgd" or self.momentum or self.moment_dtype == "float32",
            "optimizer.moment_dtype is set, but SGD without optimizer.momentum has no moments; drop it.",
        )


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """How token losses become one number."""

    normalize: str = "tokens"  # "microbatch": the original's mean of the microbatches' means
    chunk_size: int = 2048  # supervised tokens per device whose logits exist at one time
    z_loss: float = 0.0  # this share of the squared log-sum-exp of a token's logits is added to its loss

    def __post_init__(self):
        one_of("loss.normalize", self.normalize, ("tokens", "microbatch"))
        require(self.chunk_size > 0, f"loss.chunk_size={self.chunk_size} must be positive.")
        require(0 <= self.z_loss < math.inf, f"loss.z_loss={self.z_loss} must not be negative.")


def _check_interval(key: str, value: float | None) -> None:
    require(
        value is None or 0 < value < 1 or (1 <= value < math.inf and value == int(value)),
        f"{key}={value} is a number of steps, or a share of the stage between 0 and 1.",
    )


def _interval(value: float, num_steps: int) -> int:
    """A number of steps, or a share of `num_steps`, in steps."""
    return int(value) if value >= 1 else math.ceil(num_steps * value)


REPORTERS = ("none", "jsonl", "tensorboard", "wandb")
ATTENTIONS = ("auto", "reference", "xla", "flash_tpu", "splash", "mosaic_gpu", "cudnn", "xla_cpu")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    num_epochs: float = 1.0
    max_steps: int | None = None  # overrides num_epochs
    accumulation_steps: int = 1
    dtype: str = "bfloat16"  # of the computation; trained parameters are always float32
    frozen_dtype: str = "bfloat16"  # in which frozen parameters are kept
    attention: str = (
        "auto"  # or flash_tpu, splash, mosaic_gpu, cudnn, xla, xla_cpu, reference (kernels/attention.py)
    )
    # What the backward pass recomputes: full (most), dots (attention and elementwise steps), minimal (only these; offload
    # keeps what that keeps in the host's memory), none; auto: the least that fits the devices' memory.
    remat: str = "full"
    scan_unroll: int = 1  # layers per iteration of the layer loop
    compiled_dir: str = (
        "~/.cache/llava_jax/compiled"  # where compiled steps are kept for the next run; "": nowhere
    )
    log_steps: int = 10
    report_to: str = "none"  # besides metrics.jsonl: tensorboard, wandb, or both with a comma between
    profile_steps: str = ""  # "10:13" traces the steps 10, 11 and 12 with jax.profiler
    # Evaluation on what data.val_size and its like keep out of training; the last step is always evaluated.
    eval_steps: float | None = None  # from one to the next; below 1: a share of the stage's steps
    load_best_model_at_end: bool = False  # the stage ends with the parameters of its best evaluation
    metric_for_best_model: str = "eval_loss"  # with named sets also eval_NAME_loss and so on
    early_stopping_patience: int | None = (
        None  # so many evaluations in a row that are not the best end the stage
    )
    max_skipped_steps: int = 3  # so many steps in a row without finite loss and gradients end the run
    hang_timeout_minutes: float | None = (
        30.0  # a wait for data, devices or files that takes longer ends the run
    )

    def __post_init__(self):
        for key in ("dtype", "frozen_dtype"):
            one_of(f"train.{key}", getattr(self, key), ("bfloat16", "float32"))
        one_of("train.attention", self.attention, ATTENTIONS)
        one_of("train.remat", self.remat, ("auto", "none", "minimal", "offload", "dots", "full"))
        _positive("train", self, "num_epochs")
        require(
            self.max_steps is None or self.max_steps > 0,
            f"train.max_steps={self.max_steps} must be positive.",
        )
        require(
            self.accumulation_steps > 0,
            f"train.accumulation_steps={self.accumulation_steps} must be positive.",
        )
        require(self.scan_unroll > 0, f"train.scan_unroll={self.scan_unroll} must be positive.")
        require(self.log_steps > 0, f"train.log_steps={self.log_steps} must be positive.")
        for name in split_names(self.report_to):
            one_of("train.report_to", name, REPORTERS)
        require(
            not self.profile_steps or self.profiled is not None,
            f"train.profile_steps={self.profile_steps!r} is no slice of steps; write '10:13' for the steps 10, 11 and 12.",
        )
        self._check_evaluation()
        _positive("train", self, "max_skipped_steps")
        if self.hang_timeout_minutes is not None:
            _positive("train", self, "hang_timeout_minutes")

    def _check_evaluation(self) -> None:
        _check_interval("train.eval_steps", self.eval_steps)
        metric = self.metric_for_best_model
        require(
            re.fullmatch(r"eval_(\w+_)?(loss|perplexity|token_accuracy)", metric) is not None,
            f"train.metric_for_best_model={metric!r} is not eval_loss, eval_perplexity or eval_token_accuracy, nor one of "
            "a set by name, such as eval_NAME_loss.",
        )
        chosen = self.load_best_model_at_end or self.early_stopping_patience is not None
        require(
            chosen or metric == TrainConfig.metric_for_best_model,
            f"train.metric_for_best_model={metric!r} says what is best, but nothing asks; set "
            "train.load_best_model_at_end or train.early_stopping_patience.",
        )
        require(
            not chosen or self.eval_steps is not None,
            "train.load_best_model_at_end and train.early_stopping_patience compare evaluations; set train.eval_steps.",
        )
        if self.early_stopping_patience is not None:
            _positive("train", self, "early_stopping_patience")

    @property
    def profiled(self) -> range | None:
        """The steps to trace; None: no steps, or none that the setting says."""
        match = re.fullmatch(r"(\d+):(\d+)", self.profile_steps.strip())
        steps = range(*map(int, match.groups())) if match else range(0)
        return steps if steps and steps.start > 0 else None

    def eval_interval(self, num_steps: int) -> int:
        """Steps from one evaluation to the next in a stage of `num_steps`."""
        return num_steps if self.eval_steps is None else _interval(self.eval_steps, num_steps)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and where a run starts from. The last step of a stage is always saved.

    Names and meanings are those of the Hugging Face trainer.
    """

    save_steps: float = 500.0  # below 1: a share of the stage's steps
    save_every_minutes: float | None = None  # besides
    save_total_limit: int | None = (
        2  # the second newest stands in for the newest if that is damaged; None: all
    )
    save_only_model: bool = False  # without the optimizer's moments, so that the stage cannot be continued
    resume_from_checkpoint: str = (
        ""  # a checkpoint's directory, or a step of this run; empty: the newest good one
    )
    overwrite_output_dir: bool = (
        False  # every start throws away the checkpoints of this stage and those after it
    )

    def __post_init__(self):
        _check_interval("checkpoint.save_steps", self.save_steps)
        for key in ("save_every_minutes", "save_total_limit"):
            if getattr(self, key) is not None:
                _positive("checkpoint", self, key)
        require(
            not (self.overwrite_output_dir and self.resume_from_checkpoint),
            "checkpoint.overwrite_output_dir throws away what checkpoint.resume_from_checkpoint would continue; set one.",
        )

    def save_interval(self, num_steps: int) -> int:
        """Steps from one save to the next in a stage of `num_steps`."""
        return _interval(self.save_steps, num_steps)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices per mesh axis; one may be -1 and takes what is left. What fsdp splits is `sharding.zero`'s to say."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """What mesh.fsdp splits of the training state, in DeepSpeed's words."""

    zero: int = 3  # 3: parameters, gradients, moments; 2: gradients, moments; 1: moments
    offload_moments: bool = False  # between steps the moments lie in the host's memory

    def __post_init__(self):
        require(
            self.zero in (1, 2, 3),
            f"sharding.zero={self.zero} is none of DeepSpeed's stages 1, 2 and 3; to split nothing set mesh.fsdp=1.",
        )


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What is answered by generation: questions of a file after the last stage, none when `path` is empty; and what
    data.val_size, data.eval_path or data.eval_dataset keep out of training, the last answer of each sample."""

    path: str = ""  # JSONL: question_id, text, answer and, where there are any, image, kind
    image_folder: str = ""
    batch_size: int = 64
    max_new_tokens: int = 32
    blind: bool = False  # ask again with another question's image
    samples: int = 0  # so many of each evaluation set are answered at every evaluation, to look at
    predict_with_generate: bool = False  # the last stage's evaluation sets are answered when it has ended

    def __post_init__(self):
        require(self.samples >= 0, f"evaluate.samples={self.samples} must not be negative.")
        require(self.batch_size > 0, f"evaluate.batch_size={self.batch_size} must be positive.")
        require(self.max_new_tokens > 0, f"evaluate.max_new_tokens={self.max_new_tokens} must be positive.")


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The directory for other software written after the last stage; none when `layout` is empty.

    "llama" is the decoder alone. "peft" and "peft-llava-hf" are adapters alone, for the original's loader and for
    transformers' LLaVA.
    """

    layout: str = ""
    dtype: str = "float32"

    def __post_init__(self):
        one_of("export.layout", self.layout, ("", "llava-hf", "llava", "llama", "peft", "peft-llava-hf"))
        one_of("export.dtype", self.dtype, ("float32", "bfloat16", "float16"))


@dataclasses.dataclass(frozen=True)
class Config:
    """One training stage, complete. A recipe of several stages holds one of these per stage."""

    name: str = "llava"
    seed: int = 42
    model: ModelConfig = ModelConfig()
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    tune: TuneConfig = TuneConfig()
    lora: LoraConfig = LoraConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()

    def __post_init__(self):
        require(0 <= self.seed < 2**32, f"seed={self.seed} must lie in 0 to {2**32 - 1}.")
        rest = self.data.batch_size % self.train.accumulation_steps
        require(
            rest == 0,
            f"data.batch_size={self.data.batch_size} is not a multiple of "
            f"train.accumulation_steps={self.train.accumulation_steps}.",
        )
        require(
            self.data.max_length <= self.model.text.max_position_embeddings,
            f"data.max_length={self.data.max_length} exceeds the decoder's model.text.max_position_embeddings="
            f"{self.model.text.max_position_embeddings}; a decoder goes on to learn longer rows where both are raised, with "
            "model.text.rope_scaling.rope_type='linear' and .factor for much longer ones.",
        )
        require(
            self.model.num_image_tokens < self.data.max_length,
            f"One image takes {self.model.num_image_tokens} tokens, more than data.max_length={self.data.max_length} "
            "leaves room for; raise data.max_length.",
        )
        require(
            self.train.eval_steps is None or self.data.evaluates,
            "train.eval_steps is set, but there is nothing to evaluate on; set data.val_size, data.eval_path or "
            "data.eval_dataset.",
        )
        self._check_what_trains()

    def _check_what_trains(self) -> None:
        tune, optimizer = self.tune, self.optimizer
        modules = ("vision_tower", "projector", "language_model")
        for module in modules:
            for key in (f"{module}_learning_rate", f"{module}_weight_decay"):
                require(
                    getattr(optimizer, key) is None or tune.trains(module),
                    f"optimizer.{key} is set but tune.{module}='frozen', so it would reach nothing; drop one.",
                )
        require(
            optimizer.learning_rate == OptimizerConfig.learning_rate
            or any(tune.trains(m) and getattr(optimizer, f"{m}_learning_rate") is None for m in modules),
            f"optimizer.learning_rate={optimizer.learning_rate:g} reaches nothing: every module that trains has a rate of "
            "its own; leave one of them at None.",
        )
        require(
            self.lora.quantization == "none" or tune.language_model == "lora",
            f"lora.quantization={self.lora.quantization!r} is of the decoder's frozen kernels beside adapters, "
            f"but tune.language_model={tune.language_model!r}; set that to 'lora', or lora.quantization='none'.",
        )
        with_lora = [module for module in modules if getattr(tune, module) == "lora"]
        require(
            with_lora or (self.lora == LoraConfig() and optimizer.loraplus_lr_ratio == 1.0),
            "lora.* or optimizer.loraplus_lr_ratio is set, but no module trains by LoRA; set tune.language_model='lora'.",
        )
        require(
            self.init.adapters or not self.lora.create_new_adapter,
            "lora.create_new_adapter is about init.adapters, which names none; drop it: a new adapter is trained anyway.",
        )
