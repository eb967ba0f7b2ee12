"""Set D: forward passes, losses, gradients and greedy generation of the original's own classes, in float32."""

import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from llava_jax.convert.names import model_rows, spell
from llava_jax.convert.opening import open_model
from llava_jax.decoding import GREEDY, continue_prompts
from llava_jax.generation import left_pad
from llava_jax.kernels.cross_entropy import supervised_cross_entropy
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.step import abstract_model, bind
from tests.golden.files import load_json, load_npz, unpacked

TOLERANCE = 1e-5  # relative to the largest entry


def check(folder: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    """Yields (case, None or what differs)."""
    del tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        models = unpacked(folder, Path(scratch))
        load = cache(_load)
        for case in load_json(folder / "index.json"):
            name = f"{case['model']}/{case['case']}"
            data = load_npz(folder / case["file"])
            model = load(models / case["model"])
            if case["case"] == "generate":
                yield from _check_generation(name, model, case["runs"], data)
            else:
                yield name, _compare_forward(model, case, data)
        for hf in sorted(models.glob("*_hf")):
            twin = models / hf.name.removesuffix("_hf")
            yield hf.name, _compare_parameters(load(hf), load(twin))


def _load(path: Path):
    source = open_model(path)
    graphdef, _ = abstract_model(source.config)
    return (
        source.config,
        graphdef,
        {name: jnp.asarray(source.read(name), jnp.float32) for name in source.names()},
    )


def _compare_parameters(model, expected) -> str | None:
    parameters, expected = model[2], expected[2]
    if parameters.keys() != expected.keys():
        return f"parameters differ: {sorted(parameters.keys() ^ expected.keys())}"
    return next((f"{n} differs" for n in expected if not np.array_equal(parameters[n], expected[n])), None)


def _compare_forward(model, case: dict, data: dict[str, np.ndarray]) -> str | None:
    config, graphdef, parameters = model
    batch = _merge(config, case["config_overrides"], data)
    B, T = batch["tokens"].shape
    real = batch["segment_ids"] > 0
    if "merged_attention_mask" in data and not np.array_equal(real, data["merged_attention_mask"]):
        return "the rows' real positions differ"
    if "merged_labels" in data and not np.array_equal(batch["labels"], data["merged_labels"]):
        return "the labels differ"

    loss, outputs, grads = _run(parameters, _round_up(batch), graphdef=graphdef)
    found = {
        key: np.asarray(value)[:B, :T][real] for key, value in outputs.items() if not key.startswith("image_")
    }
    expected = {key: data[key][real] for key in ("merged_inputs_embeds", "logits") if key in data}
    if "logits_at" in data:
        rows, times = data["logits_positions"].T
        mask = real[rows, times]
        found["logits_at"] = np.asarray(outputs["logits"])[rows, times][mask]
        expected["logits_at"] = data["logits_at"][mask]
    for key in ("image_features_selected", "image_features_projected"):
        if key in data:
            used = batch["image_slots"]
            found[key] = np.stack([np.asarray(outputs[key])[row, slot] for row, slot, _ in used])
            expected[key] = data[key][[index for _, _, index in used]]
    for key, value in expected.items():
        if problem := _difference(key, found[key], value):
            return problem
    if case["loss"] is None:
        return None
    if problem := _difference("loss", np.asarray(loss), np.asarray(case["loss"])):
        return problem
    return _compare_gradients(config, grads, case["grad_norm_and_sum"], data)


@partial(jax.jit, static_argnames="graphdef")
def _run(parameters: dict, batch: dict, *, graphdef):
    """-> loss, outputs by the golden files' names, gradients by parameter."""

    def loss_fn(parameters):
        network = bind(graphdef, parameters)
        embeddings = network.embed(batch["tokens"], batch["images"])
        hidden = network.language_model(embeddings, batch["positions"], batch["segment_ids"])
        total, count = supervised_cross_entropy(hidden, network.language_model.head(), batch["labels"])
        outputs = {"merged_inputs_embeds": embeddings, "logits": network.language_model.logits(hidden)}
        B, M = batch["images"].shape[:2]
        if M:
            pixels = batch["images"].reshape(B * M, *batch["images"].shape[2:])
            features = network.vision_tower(pixels)
            features = features[:, 1:] if network.config.select_feature == "patch" else features
            outputs["image_features_selected"] = features.reshape(B, M, *features.shape[1:])
            projected = network.encode_images(pixels)
            outputs["image_features_projected"] = projected.reshape(B, M, *projected.shape[1:])
        return total / jnp.maximum(count, 1), outputs

    (loss, outputs), grads = jax.value_and_grad(loss_fn, has_aux=True)(parameters)
    return loss, outputs, grads


def _round_up(batch: dict) -> dict:
    """Empty rows, columns and image slots, so that all cases run in few shapes."""
    B, T = batch["tokens"].shape
    M = batch["images"].shape[1]
    rows, columns, slots = -B % 4, -T % 48, M % 2
    padded = {
        key: np.pad(batch[key], ((0, rows), (0, columns)), constant_values=-100 if key == "labels" else 0)
        for key in ("tokens", "labels", "positions", "segment_ids")
    }
    return padded | {"images": np.pad(batch["images"], ((0, rows), (0, slots), (0, 0), (0, 0), (0, 0)))}


def _compare_gradients(config, grads: dict, expected: dict, data: dict) -> str | None:
    tensors = original_tensors(config, grads)
    for name, (norm, total) in expected.items():
        grad = tensors[name].astype(np.float64)
        if abs(np.linalg.norm(grad) - norm) > TOLERANCE * norm:
            return f"the gradient of {name} has norm {np.linalg.norm(grad)}, not {norm}"
        if abs(grad.sum() - total) > TOLERANCE * norm * grad.size**0.5:
            return f"the gradient of {name} sums to {grad.sum()}, not {total}"
        if f"grad.{name}" in data and (problem := _difference(f"grad {name}", grad, data[f"grad.{name}"])):
            return problem
    return None


def original_tensors(config, leaves: dict) -> dict[str, np.ndarray]:
    """Arrays under our names as the original's tensors, vision tower excepted."""
    tensors = {}
    for row in model_rows(config):
        if row.leaf not in leaves or row.leaf.startswith("vision_tower"):
            continue
        array = np.asarray(leaves[row.leaf])
        parts = array if row.stacked else [array]
        for tensor, part in zip(row.tensors, parts, strict=True):
            tensors[spell(tensor, "llava", config.projector_type)] = row.to_theirs(part)
    return tensors


def _merge(config, overrides: dict, data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Rows as the data pipeline would deliver them, from the original's arguments."""
    ids = data["input_ids"]
    mask = data.get("attention_mask", np.ones_like(ids, bool))
    labels = data.get("labels", np.full_like(ids, -100))
    limit = overrides.get("tokenizer_model_max_length") or 2048
    rows, images, slots, consumed = [], [], [], 0
    for row_ids, row_labels, row_mask in zip(ids, labels, mask, strict=True):
        row = len(rows)
        tokens, targets = row_ids[row_mask], row_labels[row_mask]
        num_images = int((tokens == IMAGE_TOKEN).sum())
        images.append(data["images"][consumed : consumed + num_images] if num_images else [])
        slots += [(row, slot, consumed + slot) for slot in range(num_images)]
        consumed += max(1, num_images)  # a row without an image is given one all the same
        copies = np.where(tokens == IMAGE_TOKEN, config.num_image_tokens, 1)
        targets = np.where(tokens == IMAGE_TOKEN, -100, targets)
        rows.append((tokens.repeat(copies)[:limit], targets.repeat(copies)[:limit]))

    B, T, M = len(rows), max(len(tokens) for tokens, _ in rows), max(map(len, images))
    size = config.vision.image_size
    batch = {key: np.zeros((B, T), np.int32) for key in ("tokens", "segment_ids")}
    batch["labels"] = np.full((B, T), -100, np.int32)
    batch["positions"] = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    batch["images"] = np.zeros((B, M, size, size, 3), np.float32)
    for row, (tokens, targets) in enumerate(rows):
        left = overrides.get("tokenizer_padding_side") == "left"
        place = slice(T - len(tokens), T) if left else slice(0, len(tokens))
        batch["tokens"][row, place], batch["labels"][row, place] = tokens, targets
        batch["segment_ids"][row, place] = 1
        for slot, image in enumerate(images[row]):
            batch["images"][row, slot] = image.transpose(1, 2, 0)
    batch["image_slots"] = slots  # (row, slot, index in data["images"]) of every image that is used
    return batch


def _check_generation(name: str, model, runs: list[dict], data: dict) -> Iterator[tuple[str, str | None]]:
    config, graphdef, parameters = model
    prompts, images = [], []
    for i in range(len(runs)):
        prompt = data[f"g{i}_input_ids"]
        prompts.append(prompt.repeat(np.where(prompt == IMAGE_TOKEN, config.num_image_tokens, 1)))
        images.append(list(data[f"g{i}_images"].transpose(0, 2, 3, 1).astype(np.float32)))
    for rows in ([0], list(range(len(runs)))):  # alone and batched
        batch = left_pad([prompts[i] for i in rows], [images[i] for i in rows], config.vision.image_size)
        how = dict(graphdef=graphdef, max_new_tokens=len(runs[0]["tokens"]), end_ids=(2,), sample=False)
        found = np.asarray(continue_prompts(parameters, batch, jax.random.key(0), GREEDY, **how))
        for i, tokens in zip(rows, found.tolist(), strict=True):
            same = tokens == data[f"g{i}_tokens"].tolist()
            problem = None if same else f"generated {tokens}, not {data[f'g{i}_tokens'].tolist()}"
            yield f"{name} g{i}{'' if len(rows) == 1 else ' batched'}", problem


def _difference(what: str, found: np.ndarray, expected: np.ndarray) -> str | None:
    if found.shape != expected.shape:
        return f"{what} has shape {found.shape}, not {expected.shape}"
    worst = np.abs(found - expected).max(initial=0)
    scale = np.abs(expected).max(initial=0)
    return None if worst <= TOLERANCE * scale else f"{what} differs by {worst:.2e} at size {scale:.2e}"
