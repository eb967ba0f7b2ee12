"""How conversations are written out: the original's templates, and those of newer models, as data."""

import dataclasses

from llava_jax.config import one_of
from llava_jax.data.tokenizer import Tokenizer
from llava_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Speaker:
    """How one side's turn is written: `opening` + `name` + `before` + text + `after`.

    Learnt are the opening, whoever speaks, and an assistant's turn from `before` to the end of `after`.
    """

    name: str
    before: str
    after: str
    opening: str = ""


@dataclasses.dataclass(frozen=True)
class Template:
    """How a conversation is written: its system text, then the turns, then `closing`."""

    system: str
    human: Speaker
    assistant: Speaker
    around_system: tuple[str, str] = ("", " ")  # written with a system text; without one they are left out
    system_in_question: bool = False  # the system text is part of the first question
    between_rounds: str = ""  # in front of every question but the first, if anything is written for it
    closing: str = ""  # learnt
    image: str = "<image>"  # how a placeholder is written
    caption_only: bool = False  # one picture, one caption: what the human asks is not written
    skip_empty: bool = True  # of an empty turn only the opening and the name are written
    required_tokens: tuple[str, ...] = ()  # each is one token, or the model could not tell it from text
    original_mask: str = ""  # which of original_masks.py the original had for it

    def check(self, tokenizer: Tokenizer) -> None:
        """Raises ConfigError if the tokenizer lacks a token that this template is written with."""
        for token in self.required_tokens:
            if tokenizer.special_id(token) is None:
                raise ConfigError(
                    f"{tokenizer.path} has no special token {token!r}, with which the conversation template "
                    "marks its turns; choose the data.template that the model was made for."
                )

    def end_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens at which an answer is over: the end of an assistant's turn and the tokenizer's own end.

        Where the turn's end is ordinary text (`###`, a newline) there is no single token to stop at.
        """
        end = tokenizer.special_id(self.assistant.after.strip())
        return (tokenizer.eos_id,) if end in (None, tokenizer.eos_id) else (tokenizer.eos_id, end)


# The texts and separators are those of llava/conversation.py.
_CHAT = (
    "A chat between a curious {0} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {0}'s questions."
)
_VISION = (
    "You are able to understand the visual content that the user provides, and assist the user with a variety of "
    "tasks using natural language."
)
_TAGGED = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language."  # no space follows in the original either
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
_TAGS = "<Image><image></Image>"

_V1 = Template(
    system=_CHAT.format("user"),
    human=Speaker("USER:", " ", " "),
    assistant=Speaker("ASSISTANT:", " ", "</s>"),
    required_tokens=("</s>",),
    original_mask="v1",
)
_V1_HUMAN = dataclasses.replace(_V1, system=_CHAT.format("human"))


def _v1_ending_in(end: str) -> Template:
    """v1 as TinyLLaVA Factory writes it for another decoder (tinyllava/data/template)."""
    assistant = dataclasses.replace(_V1.assistant, after=end)
    return dataclasses.replace(_V1, assistant=assistant, required_tokens=(end,), original_mask="")


# As the original trains with it. It also learns the `###` of every turn and the assistant's name. Its own
# inference writes "###Human: ...###Assistant:", which no training saw; ours prompts as in training.
_V0 = Template(
    system=_CHAT.format("human"),
    around_system=("", "\n\n"),
    human=Speaker(" Human:", " ", "\n", opening="###"),
    assistant=Speaker("", " ", "\n", opening="### Assistant:"),
    closing="### ",
    skip_empty=False,
    original_mask="v0",
)

_INST = Template(
    system="",
    around_system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    system_in_question=True,
    human=Speaker("", "[INST] ", " [/INST]"),
    assistant=Speaker("", " ", " </s>"),
    required_tokens=("</s>",),
    original_mask="llama_2",
)
_LLAMA_2_CHAT = dataclasses.replace(
    _INST, system=_LLAMA_2, between_rounds="<s>", required_tokens=("<s>", "</s>")
)

# The original trains these with tokenizers that have no <|im_end|>, where it is spelled as text; so do we.
_MPT = Template(
    system=(
        "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers."
    ),
    around_system=("<|im_start|>system\n", "<|im_end|>"),
    human=Speaker("<|im_start|>user\n", "", "<|im_end|>"),
    assistant=Speaker("<|im_start|>assistant\n", "", "<|im_end|>"),
    original_mask="mpt",
)
_CHATML = dataclasses.replace(_MPT, system="Answer the questions.")

# https://huggingface.co/Qwen/Qwen2-7B-Instruct, chat_template in tokenizer_config.json. The newline behind the
# last answer is left out: nothing would be learnt from it.
_QWEN_2 = Template(
    system="You are a helpful assistant.",
    around_system=("<|im_start|>system\n", "<|im_end|>\n"),
    human=Speaker("<|im_start|>user\n", "", "<|im_end|>\n"),
    assistant=Speaker("<|im_start|>assistant\n", "", "<|im_end|>"),
    between_rounds="\n",
    required_tokens=("<|im_start|>", "<|im_end|>"),
)

# https://github.com/meta-llama/llama3, ChatFormat in llama/tokenizer.py.
_LLAMA_3 = Template(
    system="",
    around_system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    human=Speaker("<|start_header_id|>user<|end_header_id|>\n\n", "", "<|eot_id|>"),
    assistant=Speaker("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    required_tokens=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)

_PLAIN = Template(
    system="",
    human=Speaker("", "", ""),
    assistant=Speaker("", "", "\n"),
    caption_only=True,
    original_mask="plain",
)

TEMPLATES = {
    "v1": _V1,
    "vicuna_v1": _V1,
    "v0": _V1,  # the original's training treats --version v0 and v0.5 as v1 (llava/train/train.py)
    "v0.5": _V1,
    "llava_v1": _V1_HUMAN,
    "v1_mmtag": dataclasses.replace(_V1, system=_TAGGED, image=_TAGS),
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "default": _V0,
    "llava_v0": _V0,
    "v0_mmtag": dataclasses.replace(_V0, system=_TAGGED, image=_TAGS),
    "llama_2": _LLAMA_2_CHAT,
    "llava_llama_2": dataclasses.replace(
        _LLAMA_2_CHAT, system=f"You are a helpful language and vision assistant. {_VISION}"
    ),
    "mistral_instruct": _INST,
    "mpt": _MPT,
    "chatml_direct": _CHATML,
    "mistral_direct": _CHATML,
    "llama_3": _LLAMA_3,
    "qwen2_base": _v1_ending_in("<|endoftext|>"),
    "qwen2_instruct": _v1_ending_in("<|im_end|>"),
    "qwen_2": _QWEN_2,
}


def get_template(name: str) -> Template:
    """The template of that name; raises ConfigError listing the known ones."""
    one_of("data.template", name, tuple(TEMPLATES))
    return TEMPLATES[name]
