"""One side of `benchmarks.step_cpu`: a process that takes optimizer steps when told to.

    python -m benchmarks.step_sides SIDE WORKLOAD DTYPE WEIGHTS

It reads numbers of steps from its input, one per line, and answers each with JSON: seconds, and the steps' losses. At the
end of its input it tells its peak memory: of the whole process, and while it took the steps after the first answer.
SIDE: "ours", or the other side with attention "eager" or "sdpa", or "compiled" (sdpa, its decoder layers by
torch.compile).
"""

import contextlib
import json
import re
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.step_workload import LEARNING_RATE, NUM_BATCHES, WORKLOADS, Workload

NUM_THREADS = 2
PEERS = ("eager", "sdpa", "compiled")


def our_step(workload: Workload, dtype: str, directory: str) -> Callable[[int], float]:
    """A function that takes the step of this number and returns its loss: what the trainer runs."""
    import jax
    import jax.numpy as jnp

    from llava_jax.convert.opening import open_model
    from llava_jax.program import Program
    from llava_jax.sharding import make_mesh, place_batch
    from llava_jax.weights import load

    config = workload.config(dtype)
    program = Program(config, make_mesh(config.mesh, jax.devices()[:1]), num_steps=1000)
    weights = open_model(directory)
    frozen = load(weights, program.abstract_frozen(), jnp.dtype(dtype), program.parameter_sharding)
    state = program.new_state(
        load(weights, program.abstract_trainable(), jnp.float32, program.parameter_sharding)
    )
    train_step = program.train_step()
    batches = [workload.batch(step, workload.padded_length) for step in range(NUM_BATCHES)]
    batches = [{key: value[None] for key, value in batch.items()} for batch in batches]

    def step(number: int) -> float:
        nonlocal state
        batch = place_batch(program.mesh, batches[number % NUM_BATCHES])
        state, metrics = jax.block_until_ready(train_step(state, frozen, batch))
        return float(metrics["loss"])

    return step


def peer_step(workload: Workload, dtype: str, directory: str, how: str) -> Callable[[int], float]:
    """The same with transformers and torch: float32 parameters, autocast for bfloat16, fused AdamW."""
    import torch

    torch.set_num_threads(NUM_THREADS)
    model = load_peer(workload, directory, how)
    if dtype == "bfloat16":
        model.model.vision_tower.to(torch.bfloat16)  # frozen, as ours is
    if how == "compiled":
        for layer in model.model.language_model.layers:
            layer.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = [peer_batch(workload, step) for step in range(NUM_BATCHES)]

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(**batches[number % NUM_BATCHES], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def load_peer(workload: Workload, directory: str, how: str):
    """The model as transformers builds it, in float32, its tower frozen and its vocabulary as long as ours."""
    import torch
    from transformers import LlavaForConditionalGeneration

    attention = "eager" if how == "eager" else "sdpa"
    model = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention
    )
    model.resize_token_embeddings(workload.model.text.vocab_size)
    model.config.image_token_id = workload.image_token
    model.model.vision_tower.requires_grad_(False)
    return model.train()


def peer_batch(workload: Workload, step: int) -> dict:
    """A step's batch as LLaVA's collator pads it, to its longest row, images already normalised."""
    import torch

    vision = workload.model.vision
    batch = workload.batch(step, workload.longest)
    tokens = np.where(batch["tokens"] < 0, workload.image_token, batch["tokens"])
    pixels = (batch["images"][:, 0] / 255 - np.array(vision.image_mean)) / np.array(vision.image_std)
    return {
        "input_ids": torch.tensor(tokens, dtype=torch.long),
        "attention_mask": torch.tensor(batch["segment_ids"] > 0, dtype=torch.long),
        "labels": torch.tensor(batch["labels"], dtype=torch.long),
        "pixel_values": torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
    }


def peak_memory() -> dict[str, float]:
    """MB: of the whole process, and since `forget_peak` where the system can tell."""
    status = Path("/proc/self/status")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    since = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return {"peak_mb": peak, "peak_of_steps_mb": int(since[1]) / 1024 if since else peak}


def forget_peak() -> None:
    """Lets the system count the peak from here on; see proc(5), clear_refs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Answers until the input ends."""
    side, name, dtype, directory = sys.argv[1:]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    workload = WORKLOADS[name]
    what = workload, dtype, directory
    step = our_step(*what) if side == "ours" else peer_step(*what, side)
    number, peak = 0, 0.0
    for line in sys.stdin:
        begin = time.perf_counter()
        losses = [step(number + i) for i in range(int(line))]
        seconds = time.perf_counter() - begin
        if not number:
            peak = peak_memory()["peak_mb"]
            forget_peak()
        number += len(losses)
        print(json.dumps({"seconds": seconds, "losses": losses}), file=answers, flush=True)
    told = peak_memory()
    print(json.dumps(told | {"peak_mb": max(peak, told["peak_mb"])}), file=answers, flush=True)


if __name__ == "__main__":
    main()
