"""Traces of chosen steps, for TensorBoard's profiler or Perfetto."""

from pathlib import Path

import jax

from llava_jax.processes import is_first


class StepProfiler:
    """Runs jax.profiler around `steps`, a range of consecutive ones; the first of several processes does."""

    def __init__(self, steps: range | None, directory: Path):
        self.steps = steps if is_first() else None
        self.directory = directory
        self.running = False

    def before(self, step: int) -> None:
        """Starts the trace at its first step, or at a later one if a run continues among them."""
        if self.steps and not self.running and step in self.steps:
            jax.profiler.start_trace(self.directory)
            self.running = True

    def after(self, step: int, results) -> None:
        """Ends the trace after its last step, when the devices have computed `results`."""
        if self.running and step == self.steps[-1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what has been traced, if the run ends before the last of the steps."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
            print(f"The trace of steps is in {self.directory}", flush=True)
