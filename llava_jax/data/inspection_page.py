"""The page that `check_data` writes: one HTML file that needs nothing else."""

import base64
import io
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.inspection import Finding, Inspection, Preview

_STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --paper: #fff; --box: #f5f5f3; --bar: #4a78b5;
  --learnt: #c9edc9; --image: #cfe0fb; --good: #17692d; --bad: #a3161a; }
@media (prefers-color-scheme: dark) { :root { --ink: #ddd; --soft: #999; --paper: #16181c; --box: #22252b;
  --bar: #6d9ad8; --learnt: #1f5130; --image: #274a7c; --good: #7fd396; --bad: #ff9b94; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: var(--ink); background: var(--paper); }
h1 { line-height: 1.2; } h2 { margin-top: 3rem; border-bottom: 1px solid var(--soft); } h3 { margin-top: 2rem; }
.verdict { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .soft { color: var(--soft); white-space: pre-wrap; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td { padding: .1rem 2rem .1rem 0; } td + td { text-align: right; }
summary { cursor: pointer; overflow-wrap: anywhere; } li { overflow-wrap: anywhere; }
figure { display: inline-block; margin: 0 2rem 1rem 0; vertical-align: top; } figcaption { color: var(--soft); }
rect { fill: var(--bar); } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
article { margin: 1.5rem 0; } article h4 { margin: 0 0 .4rem; overflow-wrap: anywhere; }
img { height: 9rem; margin: 0 .4rem .4rem 0; border-radius: .2rem; } .pixels { image-rendering: pixelated; }
.chat { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--box); padding: .7rem 1rem;
  border-radius: .3rem; max-height: 30rem; overflow-y: auto; }
.learnt { background: var(--learnt); color: inherit; } .image { background: var(--image); border-radius: .2rem; }
"""
_WIDTH, _HEIGHT, _MAX_BARS, _MAX_BAR_WIDTH = 420, 120, 40, 24
_MAX_KINDS = 100
_MAX_IMAGES = 9  # of a sample; an image of LLaVA-1.6 has up to 5 tiles
_SIDE = 224  # pixels that images are shrunk to
_SMALL = 96  # pixels; smaller images are shown pixel by pixel


def write_page(path: Path, title: str, parts: Mapping[str, Inspection]) -> None:
    """Writes the page. parts: what each dataset is and what was found out about it."""
    lines = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>",
    ]
    for name, inspection in parts.items():
        lines += [f"<section>\n<h2>{escape(name)}</h2>", *_part(inspection), "</section>"]
    lines.append("</body>\n</html>\n")
    # Names of files need not be proper text.
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def _part(inspection: Inspection) -> Iterator[str]:
    kind, verdict = ("bad", inspection.refusal) if inspection.refusal else ("good", "Training may start.")
    yield f'<p class="verdict {kind}">{escape(str(verdict))}</p>'
    yield f'<p class="soft">{escape(inspection.files)}</p>\n<table>'
    for key, value in inspection.counts.items():
        yield f"<tr><td>{escape(key)}</td><td>{escape(value)}</td></tr>"
    yield "</table>\n<h3>What was found</h3>"
    yield from map(_finding, inspection.findings[:_MAX_KINDS])
    if not inspection.findings:
        yield "<p>Nothing.</p>"
    if len(inspection.findings) > _MAX_KINDS:
        yield f"<p>... and {len(inspection.findings) - _MAX_KINDS:,} more kinds</p>"
    if any(map(len, inspection.histograms.values())):
        yield "<h3>Lengths</h3>"
        for name, values in inspection.histograms.items():
            yield _histogram(name, values)
    if inspection.previews:
        yield (
            '<h3>Samples</h3>\n<p>What is learnt is <mark class="learnt">green</mark>, '
            'the place of an image <span class="image">blue</span>.</p>'
        )
        yield from map(_sample, inspection.previews)


def _finding(finding: Finding) -> str:
    items = [f"<li>{escape(message)}</li>" for message in finding.messages]
    if finding.count > len(items):
        items.append(f"<li>... and {finding.count - len(items):,} more</li>")
    summary = f"<b>{finding.count:,}</b> {escape(finding.title)}"
    return f"<details><summary>{summary}</summary>\n<ul>{''.join(items)}</ul></details>"


def _histogram(title: str, values: np.ndarray) -> str:
    """values int[n], n > 0; each bar stands for as many whole numbers as any other."""
    low, high = int(values.min()), int(values.max())
    step = (high - low) // _MAX_BARS + 1
    counts = np.bincount((values - low) // step)
    width = min(_WIDTH / len(counts), _MAX_BAR_WIDTH)
    bars = []
    for index, count in enumerate(counts.tolist()):
        first, last = low + index * step, min(low + (index + 1) * step - 1, high)
        meant = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        height = max(count / counts.max() * _HEIGHT, min(count, 1))
        bars.append(
            f'<rect x="{index * width:.1f}" y="{_HEIGHT - height:.1f}" width="{width * 0.9:.1f}" '
            f'height="{height:.1f}"><title>{meant}: {count:,}</title></rect>'
        )
    labels = f'<text x="0" y="{_HEIGHT + 13}">{low:,}</text>'
    if high > low:
        labels += f'<text x="{len(counts) * width:.1f}" y="{_HEIGHT + 13}" text-anchor="end">{high:,}</text>'
    about = f"{escape(title)}: median {np.median(values):,.0f}, mean {values.mean():,.1f}, most {high:,}"
    return (
        f"<figure><figcaption>{about}</figcaption>"
        f'<svg width="{_WIDTH}" height="{_HEIGHT + 18}" role="img">{"".join(bars)}{labels}</svg></figure>'
    )


def _sample(sample: Preview) -> str:
    images = "".join(map(_image, sample.images[:_MAX_IMAGES]))
    if len(sample.images) > _MAX_IMAGES:
        images += f"<p>... and {len(sample.images) - _MAX_IMAGES:,} more images</p>"
    tags = {"": "{}", "learnt": '<mark class="learnt">{}</mark>', "image": '<span class="image">{}</span>'}
    text = "".join(tags[kind].format(escape(text)) for text, kind in sample.pieces)
    return (
        f"<article><h4>{escape(sample.name)}, {sample.num_tokens:,} tokens</h4>\n"
        f'{images}<div class="chat">{text}</div></article>'
    )


def _image(pixels: np.ndarray) -> str:
    image = Image.fromarray(pixels)
    small = image.height < _SMALL
    image.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", quality=80)
    url = f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    style = "pixels" if small else "photo"
    return f'<img class="{style}" src="{url}" alt="">'
