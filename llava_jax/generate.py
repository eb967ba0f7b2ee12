"""python -m llava_jax.generate --model=DIR --image=FILE --prompt=TEXT: an answer about a picture."""

from absl import flags

from llava_jax import asking
from llava_jax.commands import run_command

PROMPT = flags.DEFINE_string(
    "prompt", None, "The question; <image> marks where images go, else they come first."
)
flags.mark_flag_as_required("prompt")
flags.adopt_module_key_flags(asking)


def main() -> None:
    """Prints the answer to the prompt."""
    print(f"llava_jax: reading {asking.MODEL.value}", flush=True)
    generator = asking.open_model()
    images, layouts = asking.read_images(generator)
    answers = generator.answer([PROMPT.value], [images], layouts=[layouts], **asking.how_to_answer())
    print(answers[0])


if __name__ == "__main__":
    run_command(main)
