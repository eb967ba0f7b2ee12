"""python -m benchmarks.generate_gpu [--json]: LLaVA-1.5-7B answering on one GPU, beside transformers' generate.

Prompts of an image and some text, bfloat16 weights drawn at random, greedy, no answer ends early. Prefill is the pass
over the prompt, decoding what generation takes beyond it. Each implementation runs in a process of its own; transformers
with scaled_dot_product_attention and its dynamic cache.
"""

import argparse
import dataclasses
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.isolated import TORCH_ENVIRONMENT, Child, collect, tell
from benchmarks.step_comparison import ENVIRONMENT
from benchmarks.timing import conditions, has_torch, seconds
from benchmarks.training_step import GIB, MODELS, require_accelerator
from llava_jax.config import ModelConfig
from llava_jax.decoding import GREEDY, continue_prompts
from llava_jax.generation import left_pad
from llava_jax.memory_peak import memory_peak
from llava_jax.models.llava import IMAGE_TOKEN
from llava_jax.step import abstract_model, bind, random_parameters

SEED = 42
NEVER = (-1,)  # the tokens that end an answer


@dataclasses.dataclass(frozen=True)
class Load:
    model: ModelConfig
    dtype: str
    prompt: int  # tokens, the image's included
    new_tokens: int
    batches: tuple[int, ...]
    rounds: int


LOADS = {
    "7b": Load(MODELS["7b"], "bfloat16", 640, 128, (1, 8, 32), 3),
    "tiny": Load(MODELS["tiny"], "float32", 64, 12, (1, 3), 3),
}


def draw_prompts(load: Load, batch: int) -> dict[str, np.ndarray]:
    """tokens int32[B, T], images uint8[B, H, W, 3]."""
    generator = np.random.default_rng(SEED)
    tokens = generator.integers(3, load.model.text.vocab_size - 1, size=(batch, load.prompt), dtype=np.int32)
    tokens[:, 1 : 1 + load.model.num_image_tokens] = IMAGE_TOKEN
    side = load.model.vision.image_size
    return {"tokens": tokens, "images": generator.integers(256, size=(batch, side, side, 3), dtype=np.uint8)}


def rated(load: Load, batch: int, prefill: float, whole: float, num_decoded: int) -> dict:
    """Rates, from the seconds of a prefill and of a whole generation with that many passes after it."""
    step = (whole - prefill) / num_decoded
    return {
        "batch": batch,
        "prefill_milliseconds": 1e3 * prefill,
        "prefill_tokens_per_second": batch * load.prompt / prefill,
        "milliseconds_per_token": 1e3 * step,
        "decode_tokens_per_second": batch / step,
    }


def measure_ours(load: Load) -> None:
    """Tells a row for each size of batches."""
    tell(conditions=conditions())
    dtype = jnp.dtype(load.dtype)
    graphdef, shapes = abstract_model(load.model, dtype=dtype)

    @jax.jit
    def draw():
        drawn = random_parameters(load.model, SEED, set(shapes))
        return {name: leaf.astype(dtype) for name, leaf in drawn.items()}

    @jax.jit
    def prefill(parameters, batch):
        model = bind(graphdef, parameters)
        cache = model.language_model.empty_cache(len(batch["tokens"]), load.prompt + load.new_tokens)
        arguments = (batch[key] for key in ("tokens", "images", "positions", "segment_ids"))
        return model.extend(*arguments, cache, batch["feature_ids"])

    generate = partial(
        continue_prompts, graphdef=graphdef, max_new_tokens=load.new_tokens, end_ids=NEVER, sample=False
    )
    parameters = draw()
    for size in load.batches:
        prompts = draw_prompts(load, size)
        features = np.zeros((size, load.prompt), np.int32)
        features[:, 1 : 1 + load.model.num_image_tokens] = np.arange(load.model.num_image_tokens)
        images = [[image] for image in prompts["images"]]
        batch = jax.device_put(
            left_pad(list(prompts["tokens"]), images, load.model.vision.image_size, list(features))
        )
        arguments = parameters, batch, jax.random.key(SEED), GREEDY
        first = seconds(prefill, parameters, batch, rounds=load.rounds, calls=1)
        whole = seconds(generate, *arguments, rounds=load.rounds, calls=1)
        tokens = np.asarray(generate(*arguments))[0].tolist()
        # The last token is passed through the network too, though nothing is chosen after it.
        row = rated(load, size, first, whole, load.new_tokens)
        tell(implementation="llava_jax", tokens=tokens, **row, **memory_peak())


def measure_transformers(load: Load, *, same_weights: bool) -> None:
    """The same of transformers; same_weights: those of ours, else as torch draws them."""
    import torch

    from benchmarks.timing import torch_conditions, torch_seconds
    from benchmarks.transformers_llava import DEVICE, batch_of, make_model

    require_accelerator("tiny" if same_weights else "7b", DEVICE)
    tell(conditions=torch_conditions())
    dtype = getattr(torch, load.dtype)
    model = make_model(load.model, seed=SEED if same_weights else None).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.generation_config.eos_token_id = None
    timing = dict(rounds=load.rounds, calls=1)
    for size in load.batches:
        batch = batch_of(draw_prompts(load, size), load.model)
        batch["pixel_values"] = batch["pixel_values"].to(dtype)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        with torch.inference_mode():
            generate = lambda tokens, batch=batch: model.generate(
                **batch, max_new_tokens=tokens, do_sample=False
            )
            # The prompt's own pass gives the first token.
            first = torch_seconds(partial(generate, 1), **timing)
            whole = torch_seconds(partial(generate, load.new_tokens), **timing)
            tokens = generate(load.new_tokens)[0, load.prompt :].tolist()
        row = rated(load, size, first, whole, load.new_tokens - 1)
        if DEVICE == "cuda":
            row["device_memory_peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        tell(implementation="transformers", tokens=tokens, **row)


def show(row: dict) -> None:
    if "failed" in row:
        print(f"{row['implementation']}: {row['failed']}", flush=True)
        return
    print(
        f"{row['implementation']:14}{row['batch']:>6}{row['prefill_milliseconds']:>14.2f}"
        f"{row['prefill_tokens_per_second']:>12.0f}{row['milliseconds_per_token']:>16.3f}"
        f"{row['decode_tokens_per_second']:>12.1f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generate_gpu", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--size", choices=LOADS, default="7b", help="tiny: seconds on a CPU")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each implementation")
    parser.add_argument("--measure", choices=("llava_jax", "transformers"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    load = LOADS[options.size]
    if options.measure == "llava_jax":
        require_accelerator(options.size, jax.default_backend())
        measure_ours(load)
        return
    if options.measure == "transformers":
        measure_transformers(load, same_weights=options.size == "tiny")
        return
    environments = {"llava_jax": ENVIRONMENT}
    if has_torch():
        environments["transformers"] = TORCH_ENVIRONMENT
    print(f"{'':14}{'batch':>6}{'prefill, ms':>14}{'tokens/s':>12}{'ms per token':>16}{'tokens/s':>12}")
    command = ("benchmarks.generate_gpu", f"--size={options.size}", "--measure")
    children = (Child(name, (*command, name), options.limit, own) for name, own in environments.items())
    result = collect(children, show, as_json=options.json)
    sys.exit(all("failed" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
