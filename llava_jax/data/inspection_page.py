"""The page that `check_data` writes: one HTML file that needs nothing else."""

import base64
import html
import io
from pathlib import Path

import numpy as np
from PIL import Image

from llava_jax.data.inspection import Inspection, Preview

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; }
.good { color: #17692d; } .bad { color: #a3161a; }
table { border-collapse: collapse; } td { padding: .1rem 1rem .1rem 0; } td + td { text-align: right; }
pre { white-space: pre-wrap; word-break: break-word; background: #f6f6f6; padding: .7rem; border-radius: .3rem; }
.learnt { background: #c9edc9; } .image { background: #cfe0fb; border-radius: .2rem; }
figure { display: inline-block; margin: 0 2rem 1rem 0; } svg text { font: 11px system-ui, sans-serif; fill: #555; }
img { max-height: 168px; margin: 0 .5rem .5rem 0; } li { margin-bottom: .2rem; }
"""
_BAR_WIDTH, _BAR_HEIGHT, _NUM_BARS = 12, 120, 40


def write_page(path: Path, title: str, inspection: Inspection) -> None:
    """Writes the page."""
    verdict = "Training may start." if inspection.refusal is None else str(inspection.refusal)
    parts = [
        f"<!doctype html><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        f"<pre class={'bad' if inspection.refusal else 'good'}>{html.escape(verdict)}</pre>",
        "<table>",
        *(f"<tr><td>{html.escape(key)}<td>{value}" for key, value in inspection.counts.items()),
        "</table>",
        "<h2>What was found</h2>",
        *_findings(inspection.findings),
        "<h2>Lengths</h2>",
        *(_histogram(name, values) for name, values in inspection.histograms.items()),
        "<h2>Samples</h2>",
        "<p>What is learnt is <span class=learnt>green</span>; an image's place is <span class=image>blue</span>.",
        *map(_sample, inspection.previews),
    ]
    path.write_text("\n".join(parts), encoding="utf-8")


def _findings(findings: dict[str, list[str]]) -> list[str]:
    parts = []
    for kind, messages in findings.items():
        parts.append(f"<details><summary>{html.escape(kind)}: {len(messages):,}</summary><ul>")
        parts += [f"<li>{html.escape(message)}" for message in messages[:1000]]
        if len(messages) > 1000:
            parts.append(f"<li>... and {len(messages) - 1000:,} more")
        parts.append("</ul></details>")
    return parts or ["<p>Nothing.</p>"]


def _histogram(title: str, values: np.ndarray) -> str:
    if not len(values):
        return ""
    counts, edges = np.histogram(values, _NUM_BARS)
    heights = counts / counts.max() * _BAR_HEIGHT
    bars = "".join(
        f"<rect x={index * _BAR_WIDTH} y={_BAR_HEIGHT - height:.1f} width={_BAR_WIDTH - 1} height={height:.1f} "
        f"fill=#4a78b5><title>{edges[index]:.0f} to {edges[index + 1]:.0f}: {counts[index]:,}</title></rect>"
        for index, height in enumerate(heights)
    )
    width = _NUM_BARS * _BAR_WIDTH
    return (
        f"<figure><figcaption>{html.escape(title)}: median {np.median(values):,.0f}, "
        f"mean {values.mean():,.0f}</figcaption>"
        f"<svg width={width} height={_BAR_HEIGHT + 16}>{bars}"
        f"<text x=0 y={_BAR_HEIGHT + 13}>{edges[0]:,.0f}</text>"
        f"<text x={width} y={_BAR_HEIGHT + 13} text-anchor=end>{edges[-1]:,.0f}</text></svg></figure>"
    )


def _sample(sample: Preview) -> str:
    images = "".join(f'<img src="{_data_url(image)}" alt="">' for image in sample.images)
    text = "".join(
        f"<span class={kind}>{html.escape(text)}</span>" if kind else html.escape(text)
        for text, kind in sample.pieces
    )
    return f"<h3>{html.escape(sample.name)}, {sample.num_tokens:,} tokens</h3>{images}<pre>{text}</pre>"


def _data_url(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
