"""python -m llava_jax.generate --model=DIR --image=FILE --prompt=TEXT: an answer about a picture."""

from absl import flags

from llava_jax.commands import run_command

MODEL = flags.DEFINE_string(
    "model", None, "A run directory, a converted model directory or a Hugging Face directory."
)
IMAGE = flags.DEFINE_multi_string("image", [], "An image file; repeat the flag for several, or leave it out.")
PROMPT = flags.DEFINE_string(
    "prompt", None, "The question; <image> marks where images go, else they come first."
)
TEMPLATE = flags.DEFINE_string("template", "", "Conversation template; default: the model's own.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 512, "Longest answer.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 answers with the likeliest tokens.", lower_bound=0.0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from the smallest set of this probability.", 0.0, 1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the draws when temperature > 0.", 0, 2**32 - 1)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of the weights and the computation.")
QUANTIZATION = flags.DEFINE_enum(
    "quantization", "none", ["none", "int8", "nf4"], "Keeps the decoder's kernels in 8 or 4 bits."
)
flags.mark_flags_as_required(["model", "prompt"])


def main() -> None:
    """Prints the answer to the prompt."""
    print(f"llava_jax: reading {MODEL.value}", flush=True)

    from llava_jax.generation import load_generator

    generator = load_generator(
        MODEL.value, template=TEMPLATE.value, dtype=DTYPE.value, quantization=QUANTIZATION.value
    )
    processor = generator.image_processor
    answers = generator.answer(
        [PROMPT.value],
        [[processor.read(path) for path in IMAGE.value]],
        layouts=[[processor.layout(path) for path in IMAGE.value]],
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_p=TOP_P.value,
        seed=SEED.value,
    )
    print(answers[0])


if __name__ == "__main__":
    run_command(main)
