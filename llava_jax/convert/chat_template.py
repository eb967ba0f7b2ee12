"""Our conversation templates in the language of transformers' chat templates (jinja)."""

import json
import re

from llava_jax.data.conversation import PLACEHOLDER
from llava_jax.data.templates import Speaker, Template

# Pictures are written in front of what a turn says, each on a line of its own, as our prompts do.
_CONTENT = """\
{%- macro content_of(message) -%}
{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}
{%- set seen = namespace(images=0, text='') -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{%- set seen.images = seen.images + 1 -%}
{%- else -%}{%- set seen.text = seen.text + part['text'] -%}{%- endif -%}
{%- endfor -%}
{%- set text = seen.text | trim if seen.images else seen.text -%}
{{- IMAGES -}}
{%- endif -%}
{%- endmacro -%}
"""
_LINES = "([IMAGE] * seen.images + ([text] if text else [])) | join('\\n') if seen.images else text"
_NO_IMAGES = "raise_exception('This is the decoder alone, which sees no images.') if seen.images else text"
_CAPTION = "IMAGE * seen.images if seen.images else text"

_CHAT = """\
{%- set chat = namespace(system=SYSTEM, begun=false) -%}
{%- for message in messages -%}
{%- if message['role'] == 'system' and loop.first -%}{%- set chat.system = content_of(message) -%}
{%- elif message['role'] not in ['user', 'assistant'] -%}
{{- raise_exception('Only the first message may be the system\\'s; the others are user and assistant.') -}}
{%- endif -%}
{%- endfor -%}
{%- if chat.system -%}{%- set chat.system = BEFORE_SYSTEM + chat.system + AFTER_SYSTEM -%}{%- endif -%}
SYSTEM_FIRST{%- for message in messages if message['role'] != 'system' -%}
{%- set content = content_of(message) -%}
{%- if message['role'] == 'user' -%}
SYSTEM_INSIDE{%- if chat.begun and (HUMAN_NAMED or content) -%}{{ BETWEEN }}{%- endif -%}
{%- set chat.begun = true -%}
HUMAN
{%- else -%}
{%- set chat.begun = true -%}
ASSISTANT
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ START }}{%- else -%}{{ CLOSING }}{%- endif -%}
"""
_TURN = "{{ NAME }}{%- if content or WRITTEN -%}{{ BEFORE + content + AFTER }}{%- endif -%}"

_CAPTIONS = """\
{%- for message in messages if message['role'] in ['user', 'assistant'] -%}
{{- content_of(message) -}}{%- if message['role'] == 'assistant' -%}{{ AFTER }}{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template, image: str | None) -> str:
    """A jinja text that writes a chat as `template` does in training; `image` is written for each picture, and None refuses
    them.

    Its messages are those of transformers: a role (system, user, assistant) and a content, which is a text or a
    list of images and texts.
    """
    if image is None:
        content = _fill(_CONTENT, IMAGES=_NO_IMAGES)
    else:
        content = _fill(_CONTENT, IMAGES=_CAPTION if template.caption_only else _LINES)
        content = _fill(content, IMAGE=_text(template.image.replace(PLACEHOLDER, image)))
    if template.caption_only:
        return content + _fill(_CAPTIONS, AFTER=_text(template.assistant.after))
    inside = "{%- if not chat.begun -%}{%- set content = chat.system + content -%}{%- endif -%}\n"
    return content + _fill(
        _CHAT,
        BEFORE_SYSTEM=_text(template.around_system[0]),
        AFTER_SYSTEM=_text(template.around_system[1]),
        SYSTEM_FIRST="" if template.system_in_question else "{{ chat.system }}",
        SYSTEM_INSIDE=inside if template.system_in_question else "",
        SYSTEM=_text(template.system),
        HUMAN_NAMED="true" if template.human.name else "false",
        HUMAN=_turn(template.human, template),
        ASSISTANT=_turn(template.assistant, template),
        BETWEEN=_text(template.between_rounds),
        START=_text(template.assistant.opening + template.assistant.name),
        CLOSING=_text(template.closing),
    )


def _turn(speaker: Speaker, template: Template) -> str:
    return _fill(
        _TURN,
        NAME=_text(speaker.opening + speaker.name),
        WRITTEN="false" if template.skip_empty else "true",
        BEFORE=_text(speaker.before),
        AFTER=_text(speaker.after),
    )


def _text(text: str) -> str:
    """`text` as jinja spells a string."""
    return json.dumps(text)


def _fill(pattern: str, **values: str) -> str:
    """`pattern` with its words in capitals replaced, all at once, so that no value is searched for others."""
    return re.sub(r"\b(" + "|".join(values) + r")\b", lambda match: values[match[1]], pattern)
