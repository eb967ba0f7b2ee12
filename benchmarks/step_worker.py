import json, os, sys, time
from pathlib import Path
import numpy as np
from benchmarks.step_workload import WORKLOADS, LEARNING_RATE, Workload

def ours(workload, dtype, directory):
    import jax, jax.numpy as jnp
    from llava_jax.convert.opening import open_model
    from llava_jax.program import Program
    from llava_jax.sharding import make_mesh, place_batch
    from llava_jax.weights import load
    config = workload.config(dtype)
    mesh = make_mesh(config.mesh)
    program = Program(config, mesh, 1000)
    weights = open_model(directory)
    frozen = load(weights, program.abstract_frozen(), jnp.dtype(dtype), program.parameter_sharding)
    trainable = load(weights, program.abstract_trainable(), jnp.float32, program.parameter_sharding)
    state = program.new_state(trainable)
    step = program.train_step()
    batches = [{k: v[None] for k, v in workload.batch(i, workload.padded_length).items()} for i in range(4)]
    def run(i):
        nonlocal state
        state, metrics = step(state, frozen, place_batch(mesh, batches[i % 4]))
        jax.block_until_ready((state, metrics))
        return float(metrics["loss"])
    return run

def theirs(workload, dtype, directory, how):
    import torch
    torch.set_num_threads(int(os.environ.get("T", 2)))
    from transformers import LlavaForConditionalGeneration
    model = LlavaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager" if how.startswith("eager") else "sdpa")
    model.resize_token_embeddings(workload.model.text.vocab_size)
    model.config.image_token_id = workload.image_token
    model.train()
    model.model.vision_tower.requires_grad_(False)
    if dtype == "bfloat16":
        model.model.vision_tower.to(torch.bfloat16)
    opt = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)
    from llava_jax.data.images import IMAGE_MEAN, IMAGE_STD
    batches = []
    for i in range(4):
        b = workload.batch(i, workload.longest)
        t = b["tokens"].astype(np.int64); t[t < 0] = workload.image_token
        px = ((b["images"][:, 0] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)).transpose(0, 3, 1, 2).astype(np.float32)
        batches.append(dict(input_ids=torch.tensor(t), attention_mask=torch.tensor((b["segment_ids"] > 0).astype(np.int64)), labels=torch.tensor(b["labels"].astype(np.int64)), pixel_values=torch.tensor(px)))
    call = torch.compile(model) if "compile" in how else model
    def run(i):
        opt.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = call(**batches[i % 4], use_cache=False).loss
        loss.backward()
        opt.step()
        return loss.item()
    return run

side, size, dtype, directory = sys.argv[1:]
w = WORKLOADS[size]
run = ours(w, dtype, directory) if side == "ours" else theirs(w, dtype, directory, side)
i = 0
n = int(os.environ.get("N", 6))
for _ in range(n):
    a = time.perf_counter(); c = time.process_time(); losses = []
    for _ in range(w.steps_per_round):
        losses.append(run(i)); i += 1
    print(side, size, dtype, f"{(time.perf_counter() - a) / w.steps_per_round * 1000:.2f} ms cpu {(time.process_time() - c) / w.steps_per_round * 1000:.2f}", losses[0], flush=True)
