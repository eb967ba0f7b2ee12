"""Set E: whole training runs of the original trainer, per-step losses, rates, norms and final weights, in float32."""

import dataclasses
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load as load_safetensors

from llava_jax.config import (
    Config,
    DataConfig,
    InitConfig,
    LoraConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    TuneConfig,
    VisionConfig,
)
from llava_jax.convert.adapter_names import parse
from llava_jax.convert.names import model_rows
from llava_jax.convert.opening import open_parts
from llava_jax.data.dataset import open_datasets
from llava_jax.data.image_processor import ImageProcessor
from llava_jax.data.images import load_image, preprocess
from llava_jax.data.pipeline import Pipeline
from llava_jax.data.tokenizer import load_tokenizer
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.optimizer import make_optimizer, make_schedule
from llava_jax.step import TrainState, abstract_tuned_model, make_train_step
from llava_jax.tuning import LORA_A, LORA_B, is_trainable, learning_rates
from tests.golden import Skipped
from tests.golden.files import load_json, load_npz, read_bytes, unpacked

UNSUPPORTED = ("bits",)
LOSS_TOLERANCE = 1e-5
NORM_TOLERANCE = 1e-4
WEIGHT_TOLERANCE = 1e-4
PIXEL_SUM_TOLERANCE = 5e-3  # one pixel that is off by one level changes the sum by 1.4e-2
MAX_NOISY_SHARE = (
    1e-4  # of a tensor's entries may move the other way: AdamW's sign where the gradient is about 0
)


def check(folder: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    """Yields (case, None or what differs): per run its inputs, its steps and its final weights."""
    for run in sorted(path.parent for path in folder.glob("*/run.json*")):
        asked = load_json(run / "run.json")["hyperparameters"]
        later = [key for key in UNSUPPORTED if asked.get(key) not in (None, False, 16)]
        if asked.get("lora_enable") and asked.get("lora_dropout", 0.05):
            later.append("lora_dropout, which draws other numbers in torch")
        if later:
            yield run.name, Skipped(f"runs with {', '.join(later)}")
            continue
        yield from _check_run(folder, run, tokenizer)


def _check_run(folder: Path, run: Path, tokenizer: Path | None) -> Iterator[tuple[str, str | None]]:
    record = load_json(run / "run.json")
    data = load_npz(run / "batches.npz")
    extra = load_safetensors(read_bytes(run / "init_extra.safetensors"))
    with tempfile.TemporaryDirectory() as scratch:
        base = unpacked(folder / "base", Path(scratch))
        source = open_parts(
            ModelConfig(projector_type=record["hyperparameters"]["mm_projector_type"]),
            vision_tower=str(base / "clip_tiny"),
            language_model=str(base / "llama_tiny"),
        )
        model = _with_tokens(source.config, record["hyperparameters"], extra)
        config = _config(record, model, run, folder)
        batches = list(_batches(config, record, data, load_json(run / "dataset.json")))
        sums = np.concatenate([_pixel_sums(batch["images"], config.model.vision) for batch in batches])
        worst = np.abs(sums - data["image_sums"]).max()
        yield (
            f"{run.name} images",
            None if worst < PIXEL_SUM_TOLERANCE else f"pixel sums differ by {worst:.1e}",
        )
        if tokenizer is not None:
            pad = ("[PAD]",) if record["hyperparameters"]["version"] == "v0" else ()
            loaded = load_tokenizer(str(tokenizer), pad + model.extra_tokens)
            yield f"{run.name} tokens", _compare_pipeline(config, batches, loaded)
        parameters = {name: source.read(name) for name in source.names()}
    parameters |= leaves_of(model, _with_extra_rows(extra, tensors_of(source.config, parameters)))
    yield from _train(run, config, record, parameters, batches)


def _with_extra_rows(extra: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The recorded starting tensors, where rows that were appended to one of the base's stand below these."""
    tensors = {}
    for name, tensor in extra.items():
        whole = name.removesuffix(".extra_rows")
        tensors[whole] = tensor if whole == name else np.concatenate([base[our_name(whole)], tensor])
    return tensors


def _with_tokens(model: ModelConfig, asked: dict, extra: dict[str, np.ndarray]) -> ModelConfig:
    """The model with the tokens that the original's switches add to the vocabulary."""
    flags = {key: bool(asked.get(f"mm_{key}")) for key in ("use_im_start_end", "use_im_patch_token")}
    added = sum(len(rows) for name, rows in extra.items() if name.endswith("embed_tokens.weight.extra_rows"))
    text = dataclasses.replace(model.text, vocab_size=model.text.vocab_size + added)
    return dataclasses.replace(model, text=text, **flags)


def _config(record: dict, model: ModelConfig, run: Path, folder: Path) -> Config:
    asked, args = record["hyperparameters"], record["trainer_args"]
    accumulation = asked.get("gradient_accumulation_steps", 1)
    return Config(
        model=model,
        init=InitConfig(),
        data=DataConfig(
            path=str(run / "dataset.json"),
            image_folder=str(folder / "base" / "images"),
            template=asked["version"],
            image_aspect_ratio=asked["image_aspect_ratio"],
            max_length=asked["model_max_length"],
            batch_size=asked["per_device_train_batch_size"] * accumulation,
            shuffle=False,
            mask="original",
            cache_dir="",
        ),
        tune=tune_of(asked),
        lora=_lora(asked) if tune_of(asked).language_model == "lora" else LoraConfig(),
        optimizer=OptimizerConfig(
            learning_rate=asked["learning_rate"],
            projector_learning_rate=asked.get("mm_projector_lr"),
            weight_decay=asked["weight_decay"],
            warmup_ratio=args["warmup_ratio"],
            schedule=args["lr_scheduler_type"],
            beta1=args["adam_beta1"],
            beta2=args["adam_beta2"],
            epsilon=args["adam_epsilon"],
            max_grad_norm=args["max_grad_norm"],
        ),
        loss=LossConfig(normalize="microbatch"),
        train=TrainConfig(
            accumulation_steps=accumulation, dtype="float32", frozen_dtype="float32", remat="none"
        ),
    )


def tune_of(asked: dict) -> TuneConfig:
    """What the original trains (the table of its train() in llava/train/train.py)."""
    projector = "frozen" if asked.get("freeze_mm_mlp_adapter") else "full"
    if asked.get("tune_mm_mlp_adapter") and asked.get("mm_use_im_start_end"):
        return TuneConfig(
            projector=projector, language_model="partial", language_model_modules="embed_tokens"
        )
    if asked.get("tune_mm_mlp_adapter"):
        return TuneConfig(projector=projector, language_model="frozen")
    if asked.get("lora_enable"):
        return TuneConfig(projector=projector, language_model="lora")
    if asked.get("freeze_backbone"):
        return TuneConfig(projector=projector, language_model="partial", language_model_modules="lm_head")
    return TuneConfig(projector=projector)


def _lora(asked: dict) -> LoraConfig:
    """The settings of a run, with the original's defaults."""
    return LoraConfig(
        rank=asked.get("lora_r", 64),
        alpha=float(asked.get("lora_alpha", 16)),
        dropout=0.0,
        bias=asked.get("lora_bias", "none"),
    )


def _batches(config: Config, record: dict, data: dict, samples: list[dict]) -> Iterator[dict]:
    """The recorded token ids, expanded, with images as our own preprocessing makes them."""
    size, accumulation = config.model.vision.image_size, config.train.accumulation_steps
    for step in range(record["optimizer_steps"]):
        rows = []
        for micro, ids in enumerate(record["steps"][step]["samples"]):
            prefix = f"b{step * accumulation + micro:02}_"
            for tokens, labels, mask, sample in zip(
                data[prefix + "input_ids"],
                data[prefix + "labels"],
                data[prefix + "attention_mask"],
                ids,
                strict=True,
            ):
                copies = np.where(tokens[mask] == IMAGE_TOKEN, config.model.num_image_tokens, 1)
                targets = np.where(tokens[mask] == IMAGE_TOKEN, -100, labels[mask])
                limit = config.data.max_length
                rows.append(
                    (tokens[mask].repeat(copies)[:limit], targets.repeat(copies)[:limit], samples[sample])
                )
        T = max(len(tokens) for tokens, *_ in rows)
        T += -T % 64
        batch = {key: np.zeros((len(rows), T), np.int32) for key in ("tokens", "positions", "segment_ids")}
        batch["labels"] = np.full((len(rows), T), -100, np.int32)
        batch["images"] = np.zeros((len(rows), 1, size, size, 3), np.uint8)
        for row, (tokens, targets, sample) in enumerate(rows):
            batch["tokens"][row, : len(tokens)], batch["labels"][row, : len(tokens)] = tokens, targets
            batch["positions"][row, : len(tokens)] = np.arange(len(tokens))
            batch["segment_ids"][row, : len(tokens)] = 1
            if "image" in sample:
                image = load_image(f"{config.data.image_folder}/{sample['image']}")
                batch["images"][row, 0] = preprocess(
                    image, config.model.vision, config.data.image_aspect_ratio
                )
        yield {key: value.reshape(accumulation, -1, *value.shape[1:]) for key, value in batch.items()}


def _pixel_sums(images: np.ndarray, vision: VisionConfig) -> np.ndarray:
    """The sum of the normalised pixels of each row's image, 0 for a row without one."""
    from llava_jax.models.vit import normalize

    rows = images.reshape(-1, *images.shape[3:])
    sums = np.asarray(normalize(jnp.asarray(rows), vision), np.float64).sum(axis=(1, 2, 3))
    return np.where(rows.any(axis=(1, 2, 3)), sums, 0.0)


def _compare_pipeline(config: Config, batches: list[dict], tokenizer) -> str | None:
    dataset, _ = open_datasets(config.data, seed=0)
    pipeline = Pipeline(
        config.data,
        dataset,
        tokenizer=tokenizer,
        images=ImageProcessor.from_config(config.data, config.model),
        seed=0,
        accumulation_steps=config.train.accumulation_steps,
    )
    for step, expected in enumerate(batches):
        found = pipeline.batch(step)
        T = min(found["tokens"].shape[-1], expected["tokens"].shape[-1])
        for key in ("tokens", "labels", "positions", "segment_ids"):
            if not np.array_equal(found[key][..., :T], expected[key][..., :T]):
                return f"{key} of step {step + 1} differ"
        if not np.array_equal(found["images"], expected["images"][:, :, : found["images"].shape[2]]):
            return f"images of step {step + 1} differ"
    return None


def our_name(name: str) -> str:
    """The original's name of a parameter, in PEFT's wrapping or not -> the canonical one and the side of a pair."""
    found = parse(name, "llava")
    if found is None:
        return name
    return f"{found.tensor}.lora_{found.side}" if found.side else found.tensor


def leaves_of(model: ModelConfig, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors under the original's names, whole modules of them, as our parameters."""
    tensors, leaves = {our_name(name): tensor for name, tensor in tensors.items()}, {}
    for row in model_rows(model):
        for kind, suffix in ((row.leaf.rpartition(".")[2], ""), (LORA_A, ".lora_A"), (LORA_B, ".lora_B")):
            parts = [tensors[name + suffix] for name in row.tensors if name + suffix in tensors]
            if parts:
                parts = [part.T if suffix else row.to_ours(part) for part in parts]
                leaf = np.stack(parts) if row.stacked else parts[0]
                leaves[f"{row.leaf.rpartition('.')[0]}.{kind}"] = leaf
    return leaves


def tensors_of(model: ModelConfig, leaves: dict) -> dict[str, np.ndarray]:
    """The inverse of `leaves_of`, with canonical names."""
    tensors = {}
    for row in model_rows(model):
        for kind, suffix in ((row.leaf.rpartition(".")[2], ""), (LORA_A, ".lora_A"), (LORA_B, ".lora_B")):
            leaf = leaves.get(f"{row.leaf.rpartition('.')[0]}.{kind}")
            if leaf is not None and not (suffix and not row.leaf.endswith(".kernel")):
                parts = np.asarray(leaf) if row.stacked else [np.asarray(leaf)]
                for name, part in zip(row.tensors, parts, strict=True):
                    tensors[name + suffix] = part.T if suffix else row.to_theirs(part)
    return tensors


def _train(run: Path, config: Config, record: dict, parameters: dict, batches: list[dict]):
    graphdef, shapes, _ = abstract_tuned_model(config)
    optimizer = make_optimizer(config.optimizer, len(batches))
    parameters = {name: jnp.asarray(parameters[name], jnp.float32) for name in shapes}
    trainable = {name: value for name, value in parameters.items() if is_trainable(name, config)}
    frozen = {name: value for name, value in parameters.items() if name not in trainable}
    state = TrainState(jnp.int32(0), trainable, optimizer.init(trainable))
    step_fn = jax.jit(make_train_step(graphdef, optimizer, config.loss))
    schedule, rates = make_schedule(config.optimizer, len(batches)), learning_rates(config.optimizer)
    expected_rates = [module for module in rates if config.tune.trains(module)]
    for step, (batch, expected) in enumerate(zip(batches, record["steps"], strict=True)):
        state, metrics = step_fn(state, frozen, batch)
        ours = {float(schedule(step)) * rates[module] for module in expected_rates}
        problem = None
        if abs(metrics["loss"] / expected["loss"] - 1) > LOSS_TOLERANCE:
            problem = f"loss {metrics['loss']}, not {expected['loss']}"
        elif abs(metrics["grad_norm"] / expected["grad_norm_before_clip"] - 1) > NORM_TOLERANCE:
            problem = f"gradient norm {metrics['grad_norm']}, not {expected['grad_norm_before_clip']}"
        elif not np.allclose(sorted(ours), sorted(set(expected["lr_used_per_group"])), rtol=1e-5, atol=1e-12):
            problem = f"learning rates {ours}, not {expected['lr_used_per_group']}"
        yield f"{run.name} step {step + 1}", problem
    final = load_safetensors(read_bytes(run / "final.safetensors"))
    yield from _compare_finals(run.name, config, state.trainable, parameters, final, record)


def _compare_finals(run: str, config: Config, trained: dict, parameters: dict, final: dict, record: dict):
    found, before = (tensors_of(config.model, leaves) for leaves in (trained, parameters))
    record = {
        "unchanged": {our_name(name) for name in record["final_unchanged"]},
        "whole": {our_name(k): v for k, v in (record.get("final_whole_tensor") or {}).items()},
    }
    special = re.compile(r"(.*?)((?:\.rows|\.row_numbers)?)")
    renamed = {}
    for name, tensor in final.items():
        stem, suffix = special.fullmatch(name).groups()
        renamed[name if name == "rows" else our_name(stem) + suffix] = tensor
    for name in sorted(found):
        yield f"{run} {name}", _compare_final(name, found[name], before[name], renamed, record)


def _compare_final(name: str, found: np.ndarray, before: np.ndarray, final: dict, record: dict) -> str | None:
    if name in record["unchanged"]:
        return None if np.array_equal(found, before) else "changed, but should not"
    whole = record["whole"].get(name, {})
    if whole:
        change = np.linalg.norm((found.astype(np.float64) - before).ravel())
        if abs(change / whole["change_norm"] - 1) > 1e-3:
            return f"its change has norm {change}, not {whole['change_norm']}"
    if name in final:
        expected = final[name]
    else:
        rows = final["rows"] if "rows" in final else final[f"{name}.row_numbers"]
        found, expected = found[rows], final[f"{name}.rows"]
    wrong = np.abs(found - expected) > WEIGHT_TOLERANCE
    if wrong.mean() > MAX_NOISY_SHARE:
        return f"{wrong.sum()} of {wrong.size} entries differ by up to {np.abs(found - expected).max():.1e}"
    return None
