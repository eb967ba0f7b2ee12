"""The page of what the model said as it trained: one HTML file that needs nothing else."""

import base64
import functools
import io
from collections.abc import Iterator
from html import escape

from PIL import Image

from llava_jax.data.images import load_image
from llava_jax.errors import DataError

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --box: #f5f5f3; --good: #17692d; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #999; --paper: #16181c; --box: #22252b;
  --good: #7fd396; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
article { display: grid; grid-template-columns: 14rem 1fr; gap: 1.5rem; margin: 2.5rem 0; }
@media (max-width: 40rem) { article { grid-template-columns: 1fr; } }
img { max-width: 100%; border-radius: .2rem; } .pixels { image-rendering: pixelated; min-width: 8rem; }
h2 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.soft, summary { color: var(--soft); font-size: .85rem; } summary { cursor: pointer; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
td { padding: .2rem .6rem; vertical-align: top; border-top: 1px solid var(--box); }
td:first-child { color: var(--soft); text-align: right; width: 5rem; font-variant-numeric: tabular-nums; }
.expected td { background: var(--box); font-weight: 600; } .right { color: var(--good); }
"""
_SIDE = 224  # pixels that pictures are shrunk to
_SMALL = 96  # pixels; smaller pictures are shown pixel by pixel
_MAX_IMAGES = 4  # of a question


def to_page(title: str, rows: list[dict]) -> str:
    """A page with each question, its pictures, the expected answer and those of all steps. rows: as AnswerSamples
    writes them, in the order of steps; what the last step was asked is shown."""
    asked = {}
    for row in rows:
        asked.setdefault((row["set"], row["sample"], row["prompt"]), []).append(row)
    last = max((row["step"] for row in rows), default=0)
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}: answers</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{escape(title)}: answers while it trained</h1>",
    ]
    for answers in asked.values():
        if answers[-1]["step"] == last:
            lines += _article(answers)
    lines.append("</body>\n</html>\n")
    # Names of files need not be proper text.
    return "\n".join(lines).encode("utf-8", "backslashreplace").decode()


def _article(answers: list[dict]) -> Iterator[str]:
    last = answers[-1]
    yield f"<article>\n<div>{''.join(map(_picture, last['images'][:_MAX_IMAGES]))}</div>\n<div>"
    name = f"{last['set']}: {last['sample']}" if last["set"] else last["sample"]
    yield f'<p class="soft">{escape(name)}</p>\n<h2 class="text">{escape(last["asked"])}</h2>\n<table>'
    yield _line("expected", last["label"], "expected")
    for row in reversed(answers):
        yield _line(f"{row['step']:,}", row["predict"], "right" if row["exact_match"] else "")
    yield "</table>"
    yield f'<details><summary>prompt</summary><p class="text">{escape(last["prompt"])}</p></details>'
    yield "</div>\n</article>"


def _line(head: str, text: str, kind: str) -> str:
    return f'<tr class="{kind}"><td>{head}</td><td class="text">{escape(text)}</td></tr>'


@functools.lru_cache(maxsize=256)  # the page is written anew at every evaluation
def _picture(path: str) -> str:
    try:
        image = load_image(path)
    except DataError as error:  # it is gone since
        return f'<p class="soft">{escape(str(error))}</p>'
    small = image.height < _SMALL
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=80)
    url = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return f'<img class="{"pixels" if small else "photo"}" src="{url}" alt="">'
