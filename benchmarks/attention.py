"""python -m benchmarks.attention [--check] [--sweep] [--json]: attention on one GPU, ours beside cuDNN, XLA and torch.

Every implementation is first compared with float64 on fresh random inputs, output and gradients; --check stops there.
TFLOP/s count the pairs of query and key that attend, once: 4 operations per pair, head and width forward, 10 more
backward. Each implementation runs in a process of its own.
"""

import argparse
import dataclasses
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.isolated import TORCH_ENVIRONMENT, Child, collect, tell
from benchmarks.timing import (
    conditions,
    has_torch,
    practical_peak,
    seconds,
    torch_conditions,
    torch_seconds,
)
from llava_jax.compiler import compiler_options
from llava_jax.kernels.attention import attention
from llava_jax.kernels.flash_gpu import flash_attention
from llava_jax.kernels.flash_gpu_tiles import Tiles

TOLERANCE = 0.01  # of the largest value: bfloat16 keeps 8 bits, and weights are rounded to it
OPERATIONS = {
    "forward": 4,
    "forward+backward": 14,
}  # a matmul has 2 per pair and width; 2 forward, 5 backward


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int
    T: int
    N: int
    H: int
    causal: bool
    num_segments: int = 0  # 0: rows are not packed

    def __str__(self) -> str:
        packed = f", {self.num_segments} segments" if self.num_segments else ""
        return f"{self.B} x {self.T}, {self.N} heads of {self.H}{', causal' if self.causal else ''}{packed}"

    def segment_ids(self, random: np.random.Generator) -> np.ndarray | None:
        """int32[B, T]: lengths at random, with a little padding at the end of each row."""
        if not self.num_segments:
            return None
        ids = np.zeros((self.B, self.T), np.int32)
        for row in ids:
            cuts = np.sort(random.choice(np.arange(1, self.T), self.num_segments, replace=False))
            for number, (start, stop) in enumerate(itertools.pairwise([0, *cuts]), 1):
                row[start:stop] = number
            row[cuts[-1] : self.T - self.T // 50] = self.num_segments
        return ids


SHAPES = (
    Shape(64, 577, 16, 64, causal=False),
    *(
        Shape(16384 // T, T, 32, 128, True, packed)
        for T, n in ((2048, 3), (4096, 4), (8192, 6))
        for packed in (0, n)
    ),
)
TINY = (Shape(1, 77, 1, 64, causal=False), Shape(2, 96, 2, 64, True, 3))


def num_pairs(shape: Shape, segment_ids: np.ndarray | None) -> int:
    """Pairs of query and key that attend, over all rows of the batch and one head."""
    if segment_ids is None:
        lengths = np.full(shape.B, shape.T)
    else:
        lengths = np.concatenate([np.unique(row[row > 0], return_counts=True)[1] for row in segment_ids])
    return int((lengths * (lengths + 1) // 2 if shape.causal else lengths**2).sum())


def seen_keys(
    batch: int, num_queries: int, num_keys: int, segment_ids: np.ndarray | None, causal: bool
) -> np.ndarray:
    """bool[B, 1, T, S]; B is 1 where rows do not differ."""
    seen = np.ones((batch if segment_ids is not None else 1, num_queries, num_keys), bool)
    if causal:
        seen &= np.arange(num_keys) <= np.arange(num_queries)[:, None]
    if segment_ids is not None:
        seen &= (segment_ids[:, :, None] == segment_ids[:, None]) & (segment_ids > 0)[:, :, None]
    return seen[:, None]


def oracle(q, k, v, do, segment_ids, causal, sm_scale) -> tuple[np.ndarray, ...]:
    """Output, dq, dk and dv in float64."""
    q, k, v, do = (np.asarray(x).astype(np.float64) for x in (q, k, v, do))
    K = k.shape[2]
    k, v = (x.repeat(q.shape[2] // K, axis=2) for x in (k, v))
    seen = seen_keys(len(q), q.shape[1], k.shape[1], segment_ids, causal)
    product = lambda equation, *x: np.einsum(equation, *x, optimize=True)
    scores = np.where(seen, product("BTNH,BSNH->BNTS", q, k) * sm_scale, -1e30)
    weights = np.where(seen, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    of_weights = product("BTNH,BSNH->BNTS", do, v)
    of_scores = weights * (of_weights - (weights * of_weights).sum(axis=-1, keepdims=True)) * sm_scale
    grouped = lambda x: x.reshape(*x.shape[:2], K, -1, x.shape[-1]).sum(axis=3)
    return (
        product("BNTS,BSNH->BTNH", weights, v),
        product("BNTS,BSNH->BTNH", of_scores, k),
        grouped(product("BNTS,BTNH->BSNH", of_scores, q)),
        grouped(product("BNTS,BTNH->BSNH", weights, do)),
    )


def draw(shape: Shape, seed: int) -> tuple:
    """q, k, v and the gradient of the output, bfloat16[B, T, N, H], and segment ids."""
    keys = jax.random.split(jax.random.key(seed), 4)
    size = (shape.B, shape.T, shape.N, shape.H)
    tensors = [jax.random.normal(key, size, jnp.bfloat16) for key in keys]
    return *tensors, shape.segment_ids(np.random.default_rng(seed))


def door(shape: Shape, segment_ids, *, implementation: str) -> Callable:
    """An implementation by its name, as the model calls it."""
    ids = None if segment_ids is None else jnp.asarray(segment_ids)
    return lambda q, k, v: attention(
        q, k, v, causal=shape.causal, segment_ids=ids, implementation=implementation
    )


def ours(shape: Shape, segment_ids, *, tiles: Tiles | None = None, interpret: bool = False) -> Callable:
    """Our kernel with tile sizes of its own, or in the interpreter, for which the door has no argument."""
    how = dict(causal=shape.causal, sm_scale=shape.H**-0.5, tiles=tiles, interpret=interpret)
    return lambda q, k, v: flash_attention(q, k, v, segment_ids, **how)


def of_jax(shape: Shape, segment_ids, *, implementation: str) -> Callable:
    """jax.nn's attention. Its public interface knows packed rows as a mask [B, 1, T, S] only."""
    mask = None
    if segment_ids is not None:
        ids = jnp.asarray(segment_ids)
        mask = (ids[:, None, :, None] == ids[:, None, None, :]) & (ids > 0)[:, None, :, None]
        mask |= (
            jnp.eye(shape.T, dtype=bool) & (ids == 0)[:, None, :, None]
        )  # padding sees itself: a softmax of something
    how = dict(mask=mask, is_causal=shape.causal, implementation=implementation)

    def attend(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, **how)
        return out if mask is None else out * (ids > 0)[:, :, None, None].astype(out.dtype)

    return attend


def forward(attend: Callable) -> Callable:
    return _compiled(lambda q, k, v, do: attend(q, k, v))


def forward_and_backward(attend: Callable) -> Callable:
    def run(q, k, v, do):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(do)

    return _compiled(run)


def _compiled(run: Callable) -> Callable:
    """`run` jitted as a train step is, which decides for example whether cuDNN may add in any order."""
    return jax.jit(run, compiler_options=compiler_options(jax.default_backend(), 1))


def largest_error(make: Callable, shape: Shape, seed: int) -> float:
    """Over output and gradients, as a share of each one's largest value; one row of the shape and two of its heads, of
    long ones one, for float64 takes long."""
    small = dataclasses.replace(shape, B=1, N=min(2 if shape.T <= 2048 else 1, shape.N))
    *tensors, segment_ids = draw(small, seed)
    found = forward_and_backward(make(small, segment_ids))(*tensors)
    expected = oracle(*tensors, segment_ids, small.causal, small.H**-0.5)
    shares = (np.abs(np.asarray(x) - y).max() / np.abs(y).max() for x, y in zip(found, expected, strict=True))
    return float(max(shares))


def with_torch(shape: Shape, backend: str, seed: int, **timing) -> dict[str, float]:
    """Seconds of torch's attention on dense rows: {"forward": ..., "forward+backward": ...}."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    make = lambda: torch.randn(
        shape.B, shape.N, shape.T, shape.H, device=device, dtype=torch.bfloat16, requires_grad=True
    )
    q, k, v, do = make(), make(), make(), make().detach()
    attend = lambda: scaled_dot_product_attention(q, k, v, is_causal=shape.causal)
    backward = lambda: torch.autograd.grad(attend(), (q, k, v), do)
    with sdpa_kernel(getattr(SDPBackend, backend)):
        return {
            "forward": torch_seconds(attend, **timing),
            "forward+backward": torch_seconds(backward, **timing),
        }


def sweep_tiles(tiny: bool) -> list[Tiles]:
    """Sizes of the forward kernel beside the default backward one, then the other way round."""
    if tiny:
        return [Tiles(), Tiles(keys=64)]
    forward = itertools.product((2, 3), (64, 128, 192, 256), (2, 3, 4), (True, False))
    backward = itertools.product((1, 2, 3), (64, 128), (2, 3, 4))
    names = "warpgroups", "keys", "stages", "take_turns"
    return [
        *(Tiles(**dict(zip(names, values, strict=True))) for values in forward),
        *(
            Tiles(dq_warpgroups=w, dq_keys=n, dq_stages=s, dkv_warpgroups=w, dkv_queries=n, dkv_stages=s)
            for w, n, s in backward
        ),
    ]


def implementations(options) -> dict[str, dict[str, Callable]]:
    """Name of a process -> the implementations that it measures: name -> make(shape, segment_ids) -> attend(q, k, v)."""
    by_door = lambda name: {name: lambda *x: door(*x, implementation=name)}
    found = {"xla": by_door("xla")}
    if options.platform == "gpu":
        found["cudnn"] = by_door("cudnn")
        found["cudnn, masked"] = {"cudnn, masked": lambda *x: of_jax(*x, implementation="cudnn")}
    interpret = options.platform == "cpu"
    if interpret and jax.__version_info__ < (0, 11):
        return found
    found["mosaic_gpu"] = by_door("mosaic_gpu")
    if options.sweep or interpret:
        found["mosaic_gpu"] = {
            f"mosaic_gpu {changed(tiles)}" if options.sweep else "mosaic_gpu": lambda *x, tiles=tiles: ours(
                *x, tiles=tiles, interpret=interpret
            )
            for tiles in (sweep_tiles(options.size == "tiny") if options.sweep else [None])
        }
    return found


def changed(tiles: Tiles) -> str:
    """The settings that are not the defaults."""
    pairs = dataclasses.asdict(tiles).items()
    return (
        " ".join(f"{name}={value}" for name, value in pairs if value != getattr(Tiles(), name)) or "default"
    )


def measure(
    name: str, make: Callable, shape: Shape, seed: int, timing: dict, check: bool = False
) -> list[dict]:
    """One row per pass, with `check` one without times; a row with "failed" where it cannot run or is wrong."""
    base = {"shape": str(shape), "implementation": name}
    try:
        error = largest_error(make, shape, seed)
        if not error < TOLERANCE:
            return [
                base | {"failed": f"differs from float64 by {error:.1e} of the largest value", "wrong": True}
            ]
        if check:
            return [base | {"error": error}]
        *tensors, segment_ids = draw(shape, seed)
        attend = make(shape, segment_ids)
        pairs = num_pairs(shape, segment_ids)
        times = {
            "forward": seconds(forward(attend), *tensors, **timing),
            "forward+backward": seconds(forward_and_backward(attend), *tensors, **timing),
        }
    except (
        ValueError,
        NotImplementedError,
        RuntimeError,
    ) as problem:  # too large, not supported, out of memory
        return [base | {"failed": str(problem).splitlines()[0][:100], "wrong": False}]
    return [base | rated(shape, pairs, which, taken) | {"error": error} for which, taken in times.items()]


def rated(shape: Shape, pairs: int, which: str, taken: float) -> dict:
    operations = OPERATIONS[which] * pairs * shape.N * shape.H
    return {"pass": which, "milliseconds": 1e3 * taken, "tflops": operations / taken / 1e12}


def measure_torch(shape: Shape, seed: int, timing: dict) -> Iterator[dict]:
    """Rows of its two kernels for training."""
    for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        base = {"shape": str(shape), "implementation": f"torch {backend}"}
        try:
            times = with_torch(shape, backend, seed, **timing)
        except RuntimeError as problem:  # not for this device or shape
            yield base | {"failed": str(problem).splitlines()[0][:100], "wrong": False}
            continue
        for which, taken in times.items():
            yield base | rated(shape, num_pairs(shape, None), which, taken)


def measure_all(options) -> Iterator[dict]:
    """What a process measures: first its conditions, then its rows."""
    if options.platform == "gpu" and options.measure != "torch" and jax.default_backend() != "gpu":
        sys.exit("No GPU here; --platform=cpu --size=tiny runs the interpreter.")
    tiny = options.size == "tiny"
    timing = dict(rounds=1, calls=1) if tiny else dict(rounds=7, calls=20)
    shapes = [shape for shape in (TINY if tiny else SHAPES) if options.only in str(shape)]
    if options.measure == "torch":
        yield {"conditions": torch_conditions()}
        for shape in shapes:
            if not shape.num_segments:
                yield from measure_torch(shape, options.seed, timing)
        return
    peak = practical_peak(256 if tiny else 8192, **timing)
    yield {"conditions": conditions() | {"peak_tflops": peak, "seed": options.seed}}
    for shape in shapes:
        if options.measure == "cudnn, masked" and not shape.num_segments:
            continue
        for name, make in implementations(options)[options.measure].items():
            for row in measure(name, make, shape, options.seed, timing, options.check):
                yield row | ({"share_of_peak": row["tflops"] / peak} if "tflops" in row else {})


def show(row: dict) -> None:
    line = f"{row.get('shape', ''):52}{row['implementation']:44}"
    if "failed" in row:
        print(line + row["failed"], flush=True)
        return
    if "tflops" in row:
        share = 100 * row.get("share_of_peak", float("nan"))
        line += f"{row['pass']:18}{row['milliseconds']:10.3f}{row['tflops']:10.1f}{share:9.1f}"
    line = f"{line:143}"
    print(f"{line}{row.get('error', float('nan')):11.1e}", flush=True)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument(
        "--platform", choices=("gpu", "cpu"), default="gpu", help="cpu: the interpreter, with --size=tiny"
    )
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: seconds on a CPU")
    parser.add_argument("--tiny", action="store_const", dest="size", const="tiny", help="--size=tiny")
    parser.add_argument("--check", action="store_true", help="compare with float64, time nothing")
    parser.add_argument("--sweep", action="store_true", help="tile sizes of our kernels")
    parser.add_argument("--only", default="", help="shapes whose description contains this")
    parser.add_argument("--limit", type=float, default=180.0, help="seconds for each implementation")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the inputs; default: the time")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    if options.measure:
        for row in measure_all(options):
            tell(**row)
        return
    environment = {}
    if options.platform == "cpu":
        environment["JAX_PLATFORMS"] = "cpu"
        # The interpreter's warpgroups wait for each other; XLA has a thread for each of them if it has many devices.
        environment["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    names = [*implementations(options)]
    if has_torch() and options.platform == "gpu" and not options.check:
        names.append("torch")
    command = ("benchmarks.attention", *sys.argv[1:], f"--seed={options.seed}", "--measure")
    print(
        f"{'shape':52}{'implementation':44}{'pass':18}{'ms':>10}{'TFLOP/s':>10}{'% peak':>9}{'max error':>11}"
    )
    children = (
        Child(name, (*command, name), options.limit, TORCH_ENVIRONMENT if name == "torch" else environment)
        for name in names
    )
    result = collect(children, show, as_json=options.json)
    sys.exit(
        any(row.get("wrong") for row in result["rows"]) or all("failed" in row for row in result["rows"])
    )


if __name__ == "__main__":
    main()
