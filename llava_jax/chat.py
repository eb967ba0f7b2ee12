"""python -m llava_jax.chat --model=DIR [--image=FILE ...]: a conversation in the terminal, about pictures or not."""

import sys

from absl import flags

from llava_jax import asking
from llava_jax.commands import run_command
from llava_jax.errors import UserError

flags.adopt_module_key_flags(asking)


def main() -> None:
    """Asks for questions and prints answers, until there is no question."""
    print(
        f"llava_jax: reading {asking.MODEL.value}. An empty line or `exit` ends the conversation, `clear` begins it anew.",
        flush=True,
    )
    sys.stdin.reconfigure(
        errors="surrogateescape"
    )  # a broken character is told, and the conversation goes on
    from llava_jax.dialogue import Dialogue

    generator = asking.open_model()
    dialogue = Dialogue(generator, *asking.read_images(generator), **asking.how_to_answer())
    dialogue.begin()
    while question := _read_question():
        if question == "clear":
            dialogue.clear()
            continue
        try:
            for text in dialogue.ask(question):
                print(text, end="", flush=True)
            print()
        except UserError as error:  # of this question; the conversation goes on
            print(f"error: {error}", file=sys.stderr, flush=True)


def _read_question() -> str:
    """The next question, or ""."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return ""
    return "" if line == "exit" else line


if __name__ == "__main__":
    run_command(main)
