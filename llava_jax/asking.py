"""The flags of the commands that ask a model about pictures, and what they open."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    import numpy as np

    from llava_jax.data.image_processor import ImageLayout
    from llava_jax.generation import Generator

MODEL = flags.DEFINE_string(
    "model", None, "A run directory, a converted model directory or a Hugging Face directory."
)
IMAGE = flags.DEFINE_multi_string("image", [], "An image file; repeat the flag for several, or leave it out.")
SYSTEM = flags.DEFINE_string("system", None, "System text in place of the conversation template's.")
TEMPLATE = flags.DEFINE_string("template", "", "Conversation template; default: the model's own.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 answers with the likeliest tokens.", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of this probability.", 0.0, 1.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from so many of the likeliest; 0: from all.", lower_bound=0)
REPETITION_PENALTY = flags.DEFINE_float(
    "repetition_penalty", 1.0, "Above 1: tokens that are already there become less likely.", lower_bound=0.01
)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws when temperature > 0.", 0, 2**32 - 1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the computation.")
QUANTIZATION = flags.DEFINE_enum(
    "quantization", "none", ["none", "int8", "nf4"], "Keeps the decoder's kernels in 8 or 4 bits."
)
flags.mark_flag_as_required("model")


def open_model() -> "Generator":
    """The model that the flags name."""
    from llava_jax.generation import load_generator
    from llava_jax.gpus import require_found

    require_found()
    return load_generator(
        MODEL.value, template=TEMPLATE.value, dtype=DTYPE.value, quantization=QUANTIZATION.value
    )


def read_images(generator: "Generator") -> tuple[list["np.ndarray"], list["ImageLayout"]]:
    """The images that the flags name, as the model reads them."""
    processor = generator.image_processor
    return [processor.read(path) for path in IMAGE.value], [processor.layout(path) for path in IMAGE.value]


def how_to_answer() -> dict:
    """What the flags say of answers, as keyword arguments."""
    from llava_jax.decoding import Sampling

    return dict(
        system=SYSTEM.value,
        max_new_tokens=MAX_NEW_TOKENS.value,
        sampling=Sampling(TEMPERATURE.value, TOP_P.value, TOP_K.value, REPETITION_PENALTY.value),
        seed=SEED.value,
    )
