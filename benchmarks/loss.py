"""python -m benchmarks.loss [--check] [--json]: the loss of supervised tokens alone, beside losses of all logits.

Forward and backward pass, to the hidden states and the head: ours (llava_jax/kernels/cross_entropy.py), the same loss
written plainly in JAX, and torch's F.cross_entropy; each in a process of its own, on the same inputs. Ours is first
compared with float64, then all with each other. Memory is what the pass needs beside its inputs: of JAX by the
compiler's account, of torch by its allocator's.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.isolated import TORCH_ENVIRONMENT, Child, collect, tell
from benchmarks.timing import conditions, has_torch, seconds, torch_conditions, torch_seconds
from llava_jax.kernels.cross_entropy import IGNORE, supervised_cross_entropy

NUM_COMPARED = 512  # values of each gradient
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Size:
    B: int
    T: int
    D: int
    V: int
    dtype: str
    tolerance: float  # of values and gradients, by the root of their mean squares


SIZES = {
    "full": Size(8, 2048, 4096, 32000, "bfloat16", 0.01),  # a step of LLaVA-1.5-7B on one card
    "small": Size(2, 512, 512, 8000, "float32", 1e-5),
    "tiny": Size(2, 48, 32, 300, "float32", 1e-5),
}
SHARES = (0.17, 1.0)  # of tokens that are supervised: in LLaVA-1.5's mix (benchmarks/packing.py), and all
CHECKED = Size(1, 512, 4096, 32000, "bfloat16", 0.01)  # of the full size, what float64 computes in seconds


def draw(size: Size, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """hidden float32[B, T, D] and head float32[D, V], whose values the size's dtype holds, labels int32[B, T]."""
    generator = np.random.default_rng(seed)
    normal = lambda *shape: generator.standard_normal(shape, np.float32)
    hidden, head = normal(size.B, size.T, size.D), normal(size.D, size.V) * np.float32(size.D**-0.5)
    if size.dtype == "bfloat16":
        hidden, head = (x.astype(jnp.bfloat16).astype(np.float32) for x in (hidden, head))
    labels = generator.integers(size.V, size=(size.B, size.T), dtype=np.int32)
    labels[generator.random(labels.shape) >= share] = IGNORE
    return hidden, head, labels


def in_float64(hidden, head, labels) -> tuple[float, np.ndarray, np.ndarray]:
    """The summed loss, and its gradients of hidden and head."""
    targets = labels[:, 1:].reshape(-1)
    hidden64, head64 = hidden[:, :-1].reshape(-1, hidden.shape[-1]).astype(float), head.astype(float)
    logits = hidden64 @ head64
    logits -= logits.max(axis=-1, keepdims=True)
    weights = np.exp(logits)
    sums = weights.sum(axis=-1, keepdims=True)
    rows, kept = np.arange(len(targets)), targets != IGNORE
    loss = (np.log(sums[:, 0]) - logits[rows, targets])[kept].sum()
    weights /= sums
    weights[rows, targets] -= 1
    weights[~kept] = 0
    of_hidden = np.zeros(hidden.shape)
    of_hidden[:, :-1] = (weights @ head64.T).reshape(len(hidden), -1, hidden.shape[-1])
    return float(loss), of_hidden, hidden64.T @ weights


def of_all_logits(hidden, head, labels) -> jax.Array:
    """The same sum, with the logits of all tokens in memory."""
    logits = jnp.einsum("BTD,DV->BTV", hidden[:, :-1], head, preferred_element_type=jnp.float32)
    targets = labels[:, 1:]
    picked = jnp.take_along_axis(logits, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(targets != IGNORE, jax.nn.logsumexp(logits, axis=-1) - picked, 0.0).sum()


LOSSES = {"ours": lambda *x: supervised_cross_entropy(*x)[0], "jax, all logits": of_all_logits}


def with_jax(loss: Callable, size: Size, share: float, timing: dict) -> dict:
    """A row: value, samples of the gradients, milliseconds and bytes."""
    hidden, head, labels = draw(size, share)
    arrays = jnp.asarray(hidden, size.dtype), jnp.asarray(head, size.dtype), jnp.asarray(labels)
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(*arrays).compile()
    value, gradients = run(*arrays)
    memory = run.memory_analysis()
    return {
        "loss": float(value),
        "gradients": [sample(np.asarray(x, np.float32)) for x in gradients],
        "memory_gib": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / GIB,
        "milliseconds": 1e3 * seconds(run, *arrays, **timing),
    }


def with_torch(size: Size, share: float, timing: dict) -> dict:
    """The same of torch, whose logits are float32 in the loss, as transformers has them."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, head, labels = (torch.from_numpy(x).to(device) for x in draw(size, share))
    dtype = getattr(torch, size.dtype)
    hidden, head = (x.to(dtype).requires_grad_() for x in (hidden, head))
    targets = labels[:, 1:].reshape(-1).long()

    def run():
        logits = (hidden[:, :-1] @ head).float().flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return loss.detach(), torch.autograd.grad(loss, (hidden, head))

    value, gradients = run()
    row = {
        "loss": value.item(),
        "gradients": [sample(x.float().cpu().numpy()) for x in gradients],
        "memory_gib": None,
    }
    del gradients
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        row["memory_gib"] = (torch.cuda.max_memory_allocated() - before) / GIB
    return row | {"milliseconds": 1e3 * torch_seconds(run, **timing)}


def sample(gradient: np.ndarray) -> list[float]:
    """Some of its values, always the same ones."""
    indices = np.random.default_rng(1).integers(gradient.size, size=NUM_COMPARED)
    return gradient.reshape(-1)[indices].tolist()


def distance(a, b) -> float:
    """||a - b|| / ||b||, over the larger of two parts of a pass: its value or one of its gradients."""
    parts = zip((a[0], *a[1]), (b[0], *b[1]), strict=True)
    return max(float(np.linalg.norm(np.subtract(x, y)) / np.linalg.norm(y)) for x, y in parts)


def check(loss: Callable, size: Size) -> dict:
    """A row that says how far a loss in JAX is from float64."""
    size = CHECKED if size == SIZES["full"] else size
    errors = []
    for share in SHARES:
        inputs = draw(size, share, seed=2)
        arrays = [jnp.asarray(x, size.dtype if x.dtype == np.float32 else None) for x in inputs]
        value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(*arrays)
        expected = in_float64(*inputs)
        found = float(value), [np.asarray(x, np.float64) for x in gradients]
        errors.append(distance(found, (expected[0], expected[1:])))
    row = {"error": max(errors)}
    if not max(errors) < size.tolerance:
        row |= {"wrong": True, "failed": f"differs from float64 by {max(errors):.1e}"}
    return row


def measure_all(name: str, size: Size, only_check: bool) -> Iterator[dict]:
    """What a process measures: first its conditions, then its rows."""
    timing = dict(rounds=1, calls=1) if size == SIZES["tiny"] else dict(rounds=5, calls=5)
    yield {"conditions": torch_conditions() if name == "torch" else conditions()}
    checked = {}
    if name in LOSSES:
        checked = check(LOSSES[name], size)
        if only_check or "failed" in checked:
            yield {"implementation": name} | checked
            return
    for share in SHARES:
        how = (size, share, timing)
        row = with_torch(*how) if name == "torch" else with_jax(LOSSES[name], *how)
        yield {"implementation": name, "supervised": share, "tolerance": size.tolerance} | row | checked


def compare(rows: list[dict]) -> None:
    """Puts in the place of each row's gradients its distance to ours, which makes it wrong if that is too large."""
    gradients = [row.pop("gradients", None) for row in rows]
    of_ours = {
        row["supervised"]: (row["loss"], values)
        for row, values in zip(rows, gradients, strict=True)
        if row["implementation"] == "ours" and values
    }
    for row, values in zip(rows, gradients, strict=True):
        if values and row["supervised"] in of_ours:
            row["distance"] = distance((row["loss"], values), of_ours[row["supervised"]])
            row["wrong"] = not row["distance"] < 2 * row["tolerance"]  # each may err


def show(row: dict) -> None:
    line = f"{row['implementation']:18}"
    if "failed" in row:
        print(line + row["failed"], flush=True)
        return
    if "loss" in row:
        memory = "" if row["memory_gib"] is None else f"{row['memory_gib']:.3f}"
        line += f"{row['supervised']:>10.0%}{row['loss']:>16.4f}{row['milliseconds']:>12.3f}{memory:>10}"
    print(f"{line:66}" + (f"{row['error']:>14.1e}" if "error" in row else ""), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loss", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--size", choices=SIZES, default="full", help="small or tiny: seconds on a CPU")
    parser.add_argument("--check", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for each implementation")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.measure:
        if options.measure != "torch" and options.size == "full" and jax.default_backend() == "cpu":
            sys.exit("No accelerator here; --size=small runs on a CPU.")
        for row in measure_all(options.measure, size, options.check):
            tell(**row)
        return
    names = [*LOSSES, *(["torch"] if has_torch() and not options.check else [])]
    command = ("benchmarks.loss", *sys.argv[1:], "--measure")
    print(f"{'':18}{'supervised':>10}{'loss':>16}{'ms':>12}{'GiB':>10}{'from float64':>14}")
    # GPUs and TPUs round the factors of float32 products unless they are told not to.
    own = {"JAX_DEFAULT_MATMUL_PRECISION": "float32"} if size.dtype == "float32" else {}
    children = (
        Child(name, (*command, name), options.limit, TORCH_ENVIRONMENT if name == "torch" else own)
        for name in names
    )
    result = collect(children, show, as_json=options.json, finish=compare)
    wrong = [row for row in result["rows"] if row.get("wrong")]
    for row in wrong:
        print(f"{row['implementation']} and ours differ by {row.get('distance', 1):.1e}", file=sys.stderr)
    sys.exit(bool(wrong) or all("failed" in row for row in result["rows"]))


if __name__ == "__main__":
    main()
