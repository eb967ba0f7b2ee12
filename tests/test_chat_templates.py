"""The chat templates of exported models write what our training writes, for every conversation template."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llava_jax.convert.chat_template import chat_template
from llava_jax.data.conversation import render
from llava_jax.data.templates import TEMPLATES

CHATS = [name for name, template in TEMPLATES.items() if not template.caption_only]


def write(name: str, messages: list[dict], image: str = "<image>", **how) -> str:
    """What transformers would make of the chat: its environment, with errors instead of blanks."""

    def raise_exception(message):
        raise ValueError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.globals["raise_exception"] = raise_exception
    jinja = environment.from_string(chat_template(TEMPLATES[name], image))
    return jinja.render(messages=messages, **{"add_generation_prompt": False, "eos_token": "</s>"} | how)


def messages_of(turns, system=None) -> list[dict]:
    roles = {"human": "user", "gpt": "assistant"}
    messages = [] if system is None else [{"role": "system", "content": system}]
    for role, text in turns:
        parts = [{"type": "text", "text": text.replace("<image>", "")}]
        parts += [{"type": "image"}] * text.count("<image>")
        messages.append({"role": roles[role], "content": parts if "<image>" in text else text})
    return messages


def rendered(name: str, turns, num_images: int, system=None) -> str:
    return "".join(span.text for span in render(turns, TEMPLATES[name], num_images=num_images, system=system))


WORDS = st.text(alphabet="ab \"\\\n'{}%\u00e9", max_size=12)


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=30, deadline=None)
@given(
    first=WORDS.filter(bool),  # a template that puts the system's text there needs a question
    others=st.lists(WORDS, min_size=1, max_size=5).filter(lambda texts: len(texts) % 2),
    image=st.booleans(),
    system=st.none() | st.just("Be short."),
)
def test_a_chat_is_written_as_in_training(name, first, others, image, system):
    texts = [first + " <image>" * image, *others]
    turns = [("gpt" if i % 2 else "human", text) for i, text in enumerate(texts)]
    assert write(name, messages_of(turns, system)) == rendered(name, turns, int(image), system)


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_ends_where_the_assistant_begins(name):
    template = TEMPLATES[name]
    prompt = write(name, messages_of([("human", "Why?")]), add_generation_prompt=True)
    answered = write(name, messages_of([("human", "Why?"), ("gpt", "So.")]))
    assert answered.startswith(prompt)
    assert answered.removeprefix(prompt).startswith(template.assistant.before + "So.")


def test_captions_hide_the_question():
    turns = [("human", "Describe it. <image>"), ("gpt", "A cat.")]
    assert write("plain", messages_of(turns)) == rendered("plain", turns, 1) == "<image>A cat.\n"
    assert write("plain", messages_of(turns[:1]), add_generation_prompt=True) == "<image>"


def test_a_picture_alone_and_two_pictures():
    two = [{"type": "image"}, {"type": "text", "text": "Same?"}, {"type": "image"}]
    assert write("mistral_instruct", [{"role": "user", "content": two}]) == (
        "[INST] <image>\n<image>\nSame? [/INST]"
    )
    assert write("mistral_instruct", [{"role": "user", "content": two[:1]}]) == "[INST] <image> [/INST]"


def test_a_tagged_picture_keeps_what_the_tokenizer_needs_behind_it():
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]
    assert "USER: <Image><image> </Image>\nWhy? " in write("v1_mmtag", question, "<image> ")


def test_known_chats_literally():
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Why?")]
    assert write("qwen_2", messages_of(turns), add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert write("mistral_instruct", messages_of(turns, "Be short.")) == (
        "[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nHi [/INST] Hello </s>[INST] Why? [/INST]"
    )


@pytest.mark.parametrize("role", ["system", "tool"])
def test_roles_that_training_never_saw_are_refused(role):
    with pytest.raises(ValueError, match="Only the first message may be the system's"):
        write("v1", [{"role": "user", "content": "Hi"}, {"role": role, "content": "x"}])
