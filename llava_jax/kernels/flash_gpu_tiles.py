"""How the Hopper kernels cut attention into tiles: what a benchmark on a card may change."""

import dataclasses
import math

ROWS = 64  # of a tile of one warpgroup: the height of a wgmma instruction, and 128 would spill registers


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of the three kernels: forward, the gradient of queries (dq), and that of keys and values (dkv).

    A block has `*warpgroups` warpgroups that compute, ROWS queries (dkv: keys) each, and one that loads.
    In every step they share `*keys` keys (dkv: queries), which wait in a ring of `*stages` slots.
    """

    warpgroups: int = 2
    keys: int = 128
    stages: int = 2
    take_turns: bool = True  # one warpgroup's matmuls run while the other one is at its softmax
    dq_warpgroups: int = 2
    dq_keys: int = 64
    dq_stages: int = 3  # two keep the slots of two steps, and nothing is loaded ahead
    dkv_warpgroups: int = 2
    dkv_queries: int = 64
    dkv_stages: int = 2
    cache_bytes: int = 32 << 20  # of keys and values that blocks running together share, of 50 MB of L2

    def __post_init__(self):
        for name in ("keys", "dq_keys", "dkv_queries"):
            size = getattr(self, name)
            if size < 64 or size > 256 or size % 64:
                raise ValueError(
                    f"Tiles.{name}={size}: a step has 64, 128, 192 or 256 (swizzled tiles of 64)."
                )
        for name in ("warpgroups", "dq_warpgroups", "dkv_warpgroups"):
            if getattr(self, name) not in (1, 2, 3):
                raise ValueError(f"Tiles.{name}={getattr(self, name)}: a block has registers for 1, 2 or 3.")
        for name in ("stages", "dq_stages", "dkv_stages"):
            if getattr(self, name) < 2:
                raise ValueError(
                    f"Tiles.{name}={getattr(self, name)}: one slot is read while another is filled."
                )

    @property
    def row_multiple(self) -> int:
        """What the padded length of everything kept per query is a multiple of."""
        return math.lcm(ROWS * self.warpgroups, ROWS * self.dq_warpgroups, self.dkv_queries)
