"""A conversation with a model: questions of many turns, whose answers are told while they are made."""

import itertools
from collections.abc import Iterator

import jax
import numpy as np

from llava_jax.data.conversation import IMAGE_TOKEN, PLACEHOLDER, render_prompt
from llava_jax.data.image_processor import ImageLayout
from llava_jax.decoding import GREEDY, READ, Rows, Sampling, continue_some, read_on, read_prompts
from llava_jax.errors import ConfigError
from llava_jax.generation import Generator, expand_prompt, left_pad, until
from llava_jax.sharding import replicated


class Dialogue:
    """Turns that a person and a generator have taken, about images that the first question shows.

    Each prompt is all of the conversation, written as in training. Keys and values of what is already read of it are
    kept, so that a turn costs what is new in it. images, layouts: of one sequence, as `Generator.generate` takes them.
    Raises ConfigError for a template that writes no conversations.
    """

    def __init__(
        self,
        generator: Generator,
        images: list[np.ndarray],
        layouts: list[ImageLayout],
        *,
        max_new_tokens: int,
        system: str | None = None,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ):
        if generator.template.caption_only:
            raise ConfigError(
                "This model's conversation template writes captions, in which nobody asks anything; take "
                "llava_jax.generate, or a template of conversations, such as --template=v1."
            )
        self.generator = generator
        self.tiles = [tile for image in images for tile in image]
        self.layouts = layouts
        self.max_new_tokens = max_new_tokens
        self.system = system
        self.sampling = sampling
        self.seed = seed
        self.turns: list[tuple[str, str]] = []  # (role, text)
        self._rows: Rows | None = None  # one row
        self._read_tokens: list[int] = []  # what it has read, in slots of its cache from _padding on
        self._padding = 0

    def clear(self) -> None:
        """Begins anew, with the same images."""
        self.turns = []

    def begin(self) -> None:
        """Reads what stands in front of the first question, images included, so that its answer comes sooner."""
        self._read("?")

    def ask(self, question: str) -> Iterator[str]:
        """The answer in pieces, which together are its text.

        Raises DataError or ConfigError for a question that cannot be asked; the conversation then stays as it was.
        """
        generator, end_ids = self.generator, self.generator.end_ids
        prompt, limit = self._read(question)
        key = jax.random.fold_in(jax.random.key(self.seed), len(self.turns))
        made, told, is_over = [], "", False
        while not is_over:
            tokens, self._rows = continue_some(
                generator.parameters,
                self._rows,
                key,
                self.sampling,
                np.int32(limit - len(made)),
                graphdef=generator.graphdef,
                end_ids=end_ids,
                sample=self.sampling.temperature > 0,
                mesh=generator.mesh,
            )
            made += np.asarray(tokens)[0, : int(self._rows.num_new) - len(made)].tolist()
            self._read_tokens = [*prompt, *made]
            said = until(made, end_ids)
            text, is_over = generator.read_answer(said)
            is_over = is_over or len(said) < len(made) or len(made) == limit
            certain = text if is_over else _certain(text, generator.end_of_turn)
            if len(certain) > len(told):
                yield certain[len(told) :]
                told = certain
        if self.layouts:  # in what follows a placeholder would be the place of an image
            text = text.replace(PLACEHOLDER, "< image>")
        self.turns += [("human", question), ("gpt", text)]

    def prompt(self, question: str) -> tuple[np.ndarray, np.ndarray]:
        """The conversation up to the answer to a question, expanded: tokens and feature_ids int32[T]."""
        generator = self.generator
        (role, first), *later = (*self.turns, ("human", question))
        if PLACEHOLDER not in first:
            first = f"{PLACEHOLDER}\n" * len(self.layouts) + first
        *earlier, (_, question) = (role, first), *later
        prompt = render_prompt(
            question,
            generator.template,
            generator.tokenizer,
            num_images=len(self.layouts),
            image_markers=generator.config.use_im_start_end,
            system=self.system,
            earlier=earlier,
        )
        return expand_prompt(prompt, self.layouts, generator.config.num_image_tokens)

    def _read(self, question: str) -> tuple[list[int], int]:
        """Brings the row to the answer to a question -> the prompt, and how many tokens its answer may have.

        Tokens behind those that the row has read are read one by one, in a loop that is compiled once. Where it has read
        too little, or has no room left, all are read in one pass.
        """
        generator = self.generator
        prompt, feature_ids = self.prompt(question)
        limit = min(self.max_new_tokens, generator.room(len(prompt)))
        pairs = zip(self._read_tokens, prompt[:-1].tolist(), strict=False)
        num_known = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        rest, how = prompt[num_known:], dict(graphdef=generator.graphdef, mesh=generator.mesh)
        has_room = self._rows is not None and self._padding + len(prompt) + limit <= self._rows.num_slots
        if has_room and len(rest) <= READ and IMAGE_TOKEN not in rest:
            tokens = np.zeros((1, READ), np.int32)
            tokens[0, : len(rest)] = rest
            seen = np.zeros((1, generator.config.text.vocab_size), bool)
            seen[0, prompt[prompt != IMAGE_TOKEN]] = True
            new = np.int32(self._padding + num_known), tokens, np.int32(len(rest)), seen
            self._rows = read_on(generator.parameters, self._rows, *new, **how)
        else:
            self._rows = None  # so that there is memory for the new one
            batch = left_pad([prompt], [self.tiles], generator.config.vision.image_size, [feature_ids])
            length = batch["tokens"].shape[1]
            self._padding = length - len(prompt)
            batch = jax.device_put(batch, replicated(generator.mesh))
            slots = _power_of_two(length + limit)
            self._rows = read_prompts(generator.parameters, batch, num_slots=slots, **how)
        self._read_tokens = prompt.tolist()
        return self._read_tokens, limit


def _power_of_two(number: int) -> int:
    """The next one, so that few lengths are compiled and a conversation has room to go on."""
    return 1 << (number - 1).bit_length()


def _certain(text: str, end_of_turn: str) -> str:
    """What of an unfinished text stays whatever comes: no half characters, no beginning of the turn's end."""
    text = text.rstrip("\ufffd")
    for size in range(len(end_of_turn) - 1, 0, -1):
        if text.endswith(end_of_turn[:size]):
            text = text[:-size]
            break
    return text.rstrip()
