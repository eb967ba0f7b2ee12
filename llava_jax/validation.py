"""Losses on data that is kept out of training: when they are due, what they are, and which step's are the best."""

import math
from collections.abc import Iterable

import jax

from llava_jax.config import TrainConfig
from llava_jax.data.pipeline import Pipeline
from llava_jax.program import Program
from llava_jax.sharding import place_batch
from llava_jax.watchdog import Watchdog

_METRICS = ("loss", "perplexity", "token_accuracy")


def metric_names(sets: Iterable[str]) -> list[str]:
    """What an evaluation on sets of these names reports, "" being one that has none; eval_loss is over all of them."""
    prefixes = ["eval_", *(f"eval_{name}_" for name in sets if name)]
    return [prefix + metric for prefix in prefixes for metric in _METRICS]


def summarize(total: float, correct: int, count: int, prefix: str = "eval_") -> dict[str, float | None]:
    """Figures of a sum of losses over `count` tokens, `correct` of which were the likeliest.

    None stands for what is not finite, which JSON cannot say: the perplexity of a large loss, or all of it.
    """
    loss = total / count if count else math.nan
    try:
        perplexity = math.exp(loss)
    except OverflowError:
        perplexity = math.inf
    values = (loss, perplexity, correct / count if count else math.nan)
    return {
        prefix + metric: value if math.isfinite(value) else None
        for metric, value in zip(_METRICS, values, strict=True)
    }


class Validation:
    """The evaluations of one stage. All processes compute them and get the same figures.

    data: the sets by name. history: the figures of evaluations that an earlier run has made, by step.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: dict[str, Pipeline],
        num_steps: int,
        history: dict[int, dict[str, float | None]],
    ):
        self.config = config
        self.data = data
        self.num_steps = num_steps
        self.interval = config.eval_interval(num_steps)
        self.history = history
        self.eval_step = None  # compiled when it is first needed

    def is_due(self, step: int) -> bool:
        """Whether the parameters after this step are to be evaluated and have not been."""
        asked = step == self.num_steps or (step > 0 and step % self.interval == 0)
        return bool(self.data) and asked and step not in self.history

    def measure(self, step: int, program: Program, parameters: dict, watchdog: Watchdog) -> dict:
        """Evaluates all of the model's parameters, those after `step`; returns the figures and remembers them."""
        self.eval_step = self.eval_step or program.eval_step()
        sums = {name: self._sums(name, program, parameters, watchdog) for name in self.data}
        figures = summarize(*map(sum, zip(*sums.values(), strict=True)))
        for name, own in sums.items():
            if name:
                figures |= summarize(*own, prefix=f"eval_{name}_")
        self.history[step] = figures
        return dict(figures)

    def ranking(self) -> list[int]:
        """The evaluated steps, best first; of equals the earliest."""
        metric = self.config.metric_for_best_model
        sign = -1.0 if metric.endswith("accuracy") else 1.0

        def badness(step: int) -> float:
            value = self.history[step].get(metric)
            return math.inf if value is None else sign * value

        return sorted(sorted(self.history), key=badness)

    def best(self) -> tuple[int, float | None] | None:
        """The best evaluated step and its figure; None: nothing has been evaluated."""
        for step in self.ranking()[:1]:
            return step, self.history[step].get(self.config.metric_for_best_model)
        return None

    def has_stalled(self) -> bool:
        """Whether the last early_stopping_patience evaluations were all no better than one before them."""
        patience = self.config.early_stopping_patience
        if patience is None or not self.history:
            return False
        best = self.ranking()[0]
        return sum(step > best for step in self.history) >= patience

    def has_ended(self, step: int, meta: dict) -> bool:
        """Whether nothing is left to do after the checkpoint of this step, beside which lies `meta`."""
        ended = step == self.num_steps or self.has_stalled()
        settled = "evaluated_as" in meta or not self.config.load_best_model_at_end
        return ended and settled and not self.is_due(step)

    def _sums(
        self, name: str, program: Program, parameters: dict, watchdog: Watchdog
    ) -> tuple[float, int, int]:
        """The sum of the losses over an epoch of a set, likeliest tokens, tokens."""
        data, sums = self.data[name], (0.0, 0, 0)
        batches = data.iterate(0, data.steps_per_epoch)
        for number in range(1, data.steps_per_epoch + 1):
            what = f"evaluation batch {number}{name and f' of {name}'}"
            with watchdog.waiting(what):
                batch = next(batches)
            found = self.eval_step(parameters, place_batch(program.mesh, batch))
            with watchdog.waiting(f"the devices' result of {what}"):
                total, correct, count = jax.device_get(found)
            sums = (sums[0] + float(total), sums[1] + int(correct), sums[2] + int(count))
        return sums
