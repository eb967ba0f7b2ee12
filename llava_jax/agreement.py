"""What several processes decide together while they train, without waiting for each other."""

from collections import deque

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_CALLS_BEHIND = 2  # by then the devices have the answer, and still something to compute


class Agreement:
    """Asks of all processes, once a step: does any of them want this? A single process has its answer at once."""

    def __init__(self, mesh: Mesh):
        self.answers = deque()
        self.sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self.num_devices = mesh.size
        self.any = jax.jit(lambda wishes: wishes.any(0), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, *wishes: bool) -> list[bool]:
        """The answers to the wishes of this call; with several processes, to those of two calls ago.

        All processes call it equally often and get the same answers.
        """
        if jax.process_count() == 1:
            return list(wishes)
        rows = np.tile(np.array(wishes, bool), (len(self.sharding.addressable_devices), 1))
        shape = (self.num_devices, len(wishes))
        self.answers.append(self.any(jax.make_array_from_process_local_data(self.sharding, rows, shape)))
        if len(self.answers) <= _CALLS_BEHIND:
            return [False] * len(wishes)
        return np.asarray(self.answers.popleft()).tolist()
