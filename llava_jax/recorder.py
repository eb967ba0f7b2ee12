"""What a stage tells while it trains: rows of metrics and the progress line."""

import contextlib
import dataclasses
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from llava_jax.config import Config
from llava_jax.data.pipeline import Pipeline
from llava_jax.errors import ConfigError, DivergedError
from llava_jax.flops import Work, causal_pairs, training_flops
from llava_jax.memory_peak import memory_peak
from llava_jax.metrics import MetricsLog, Progress
from llava_jax.optimizer import make_schedule
from llava_jax.tuning import learning_rates, only_images_reach
from llava_jax.watchdog import Watchdog

_SAMPLES_NAMED = 32
_ANSWERS_SHOWN, _CHARACTERS_SHOWN = 3, 100


@dataclasses.dataclass(frozen=True)
class _Done:
    """A step that is not logged yet; its metrics may still be on their way from the device."""

    step: int
    metrics: dict[str, jax.Array]
    num_tokens: int
    num_images: int
    data_wait: float


class Recorder:
    """Logs every `log_steps` steps as one row, one step late so that devices never wait.

    peak_flops: what all devices together can compute per second; None: unknown.
    """

    def __init__(
        self,
        stage: str,
        config: Config,
        data: Pipeline,
        log: MetricsLog,
        first_step: int,
        num_steps: int,
        watchdog: Watchdog,
        peak_flops: float | None = None,
    ):
        self.stage = stage
        self.config = config
        self.data = data
        self.log = log
        self.progress = Progress(stage, num_steps, first_step)
        self.schedule = make_schedule(config.optimizer, num_steps)
        self.watchdog = watchdog
        self.pending: list[_Done] = []
        self.skipped: list[int] = []  # the latest steps in a row that changed nothing
        mine = [row for row in log.rows() if row.get("stage", "") == stage and row["step"] <= first_step]
        self.num_skipped = sum(row.get("skipped_steps", 0) for row in mine)
        self.num_bad_samples = 0
        self.peak_flops = peak_flops
        # Seconds on other things than steps, since the last row.
        self.spent: dict[str, float] = defaultdict(float)
        self.num_compilations = 0  # likewise
        self.since = time.monotonic()

    @contextlib.contextmanager
    def spending(self, what: str) -> Iterator[None]:
        """The block's time goes to `what`, which the next row tells as what_seconds."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.spent[f"{what}_seconds"] += time.monotonic() - begin

    def log_compilation(self, shape: tuple[int, int], seconds: float, found: bool) -> None:
        """A step of rows of `shape`, tokens and image slots, was compiled, or found compiled."""
        self.num_compilations += 1
        self.spent["compile_seconds"] += seconds
        how = "found compiled" if found else "compiled"
        print(f"  step for rows of {shape[0]} x {shape[1]}: {how} in {seconds:.1f} s", flush=True)

    def add(self, step: int, metrics: dict, data_wait: float) -> None:
        if self.pending and self.pending[-1].step % self.config.train.log_steps == 0:
            self.flush()
        if step == 2 and self.pending:  # the device has done the first step and computes this one
            with self.watchdog.waiting("the devices' results of the first step"):
                self._require_gradients(jax.device_get(self.pending[0].metrics))
        num_tokens, num_images = self.data.count(step - 1)
        self.pending.append(_Done(step, metrics, num_tokens, num_images, data_wait))

    def flush(self) -> None:
        """Logs what is pending: means and rates over its steps, the learning rate of the last."""
        if not self.pending:
            return
        with self.watchdog.waiting(f"the devices' results of step {self.pending[-1].step}"):
            metrics = [jax.device_get(done.metrics) for done in self.pending]
        if self.pending[0].step == 1:
            self._require_gradients(metrics[0])
        num_skipped = sum(self._is_skipped(d.step, m) for d, m in zip(self.pending, metrics, strict=True))
        finite = [values for values in metrics if not values["skipped"]]
        now = time.monotonic()
        seconds, self.since = max(now - self.since, 1e-9), now
        step = self.pending[-1].step
        row = {"stage": self.stage} if self.stage else {}
        row |= {
            "step": step,
            "epoch": round(step / self.data.steps_per_epoch, 4),
            "loss": _mean(finite, "loss"),
            "grad_norm": _mean(finite, "grad_norm"),
            **self._learning_rates(step),
            "num_supervised_tokens": int(sum(values["num_supervised_tokens"] for values in metrics)),
            "tokens_per_second": sum(done.num_tokens for done in self.pending) / seconds,
            "images_per_second": sum(done.num_images for done in self.pending) / seconds,
            "data_wait": sum(done.data_wait for done in self.pending) / seconds,
            "seconds": seconds,
            **self.spent,
            **self._work_done(metrics, seconds),
            **memory_peak(),
        }
        self.spent.clear()
        if self.num_compilations:
            row["compilations"] = self.num_compilations
            self.num_compilations = 0
        if num_skipped:
            row["skipped_steps"] = num_skipped
        self.pending = []
        self.log.append(row)
        self.progress.show(row)
        self._tell_bad_samples()

    def log_evaluation(
        self, step: int, figures: dict[str, float | None], answers: Sequence[dict] = ()
    ) -> None:
        """Logs an evaluation on data that is kept out of training; its time counts for no other row.

        answers: what the model said to some questions, as `AnswerSamples.answer` gives it; a few are shown.
        """
        row = {"stage": self.stage} if self.stage else {}
        self.log.append(row | {"step": step} | figures)
        told = ", ".join(
            f"{name} {'not finite' if value is None else f'{value:.4f}'}"
            for name, value in figures.items()
            if name != "eval_runtime"
        )
        print(f"{self.stage or 'step'} {step}: {told}", flush=True)
        for answer in _some_of_each_set(answers):
            asked, label, said = (_shortened(answer[key]) for key in ("asked", "label", "predict"))
            print(
                f"  {answer['set']}{answer['set'] and ': '}{asked} -> {said} (expected {label})", flush=True
            )
        if answers:
            for reporter in self.log.reporters:
                reporter.append_answers(step, answers)
        self.since = time.monotonic()

    def _work_done(self, metrics: list[dict], seconds: float) -> dict[str, float]:
        """The FLOPs of the model's mathematics, padding included, and their share of what the devices can compute."""
        work = Work(0, 0, 0, 0)
        for done, values in zip(self.pending, metrics, strict=True):
            work += self._work(done.step, int(values["num_supervised_tokens"]))
        flops = sum(training_flops(self.config.model, self.config.tune, work).values())
        return {"flops": flops} | ({"mfu": flops / (seconds * self.peak_flops)} if self.peak_flops else {})

    def _work(self, step: int, num_supervised: int) -> Work:
        rows, (length, num_images) = self.config.data.batch_size, self.data.schedule.step_shape(step - 1)
        lengths = self.data.measured.lengths[np.concatenate(self.data.step_rows(step - 1))]
        pairs = causal_pairs(lengths.astype(float)).sum()
        return Work(rows * length, float(pairs), rows * num_images, num_supervised)

    def _tell_bad_samples(self) -> None:
        count = len(self.data.bad_samples.report())
        if count > self.num_bad_samples:
            self.num_bad_samples = count
            print(f"{count:,} samples could not be used; bad_samples.jsonl tells which", flush=True)

    def _learning_rates(self, step: int) -> dict[str, float]:
        """`learning_rate`, and each module's own where they differ."""
        config, share = self.config, float(self.schedule(step - 1 - self.num_skipped))
        rates = {
            module: share * rate
            for module, rate in learning_rates(config.optimizer).items()
            if config.tune.trains(module)
        }
        common = {"learning_rate": rates.get("language_model", max(rates.values()))}
        if len(set(rates.values())) == 1:
            return common
        return common | {f"learning_rate_{module}": rate for module, rate in rates.items()}

    def _is_skipped(self, step: int, metrics: dict) -> bool:
        """Whether the step changed nothing. Raises DivergedError when too many in a row did not."""
        if not metrics["skipped"]:
            self.skipped = []
            return False
        self.skipped.append(step)
        self.num_skipped += 1
        print(
            f"{self.stage or 'step'} {step}: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}; "
            f"the update is not applied. Its samples: {self._samples(step)}",
            file=sys.stderr,
            flush=True,
        )
        if len(self.skipped) >= self.config.train.max_skipped_steps:
            samples = "; ".join(f"step {bad}: {self._samples(bad)}" for bad in self.skipped)
            raise DivergedError(
                f"The loss or the gradients of {self.stage or 'the run'} are not finite at step {step}, the last of "
                f"{len(self.skipped)} in a row (train.max_skipped_steps); the parameters are as they were before them. "
                "Look at their samples, lower optimizer.learning_rate or set optimizer.max_grad_norm=1.0, and start "
                f"anew with checkpoint.overwrite_output_dir=True or another --workdir. Samples: {samples}."
            )
        return True

    def _require_gradients(self, metrics: dict) -> None:
        """Raises ConfigError if all gradients of the first step are exactly 0, though its samples should teach."""
        if metrics["skipped"] or metrics["grad_norm"] != 0 or metrics["num_supervised_tokens"] == 0:
            return
        if only_images_reach(self.config) and self.data.count(0)[1] == 0:
            return  # this step has none
        raise ConfigError(
            f"All gradients of {self.stage or 'the run'} are exactly 0 at the first step, with a loss of "
            f"{metrics['loss']:g}: nothing would be learnt. What trains reaches the loss through weights that are 0, or "
            "not at all; look at the table of what trains above, at tune.* and at the weights that init.* names."
        )

    def _samples(self, step: int) -> str:
        """The names of a step's samples."""
        ids = np.concatenate(self.data.step_rows(step - 1))
        names = [self.data.dataset[int(id)].name for id in ids[:_SAMPLES_NAMED]]
        return ", ".join(names) + (f" and {len(ids) - len(names)} more" if len(ids) > len(names) else "")


def _some_of_each_set(answers: Sequence[dict]) -> list[dict]:
    """A few answers, from as many sets as there are."""
    sets = dict.fromkeys(answer["set"] for answer in answers)
    per_set = max(1, _ANSWERS_SHOWN // max(1, len(sets)))
    return [each for name in sets for each in [a for a in answers if a["set"] == name][:per_set]]


def _mean(metrics: list[dict], key: str) -> float | None:
    """None if there is nothing to take the mean of, which JSON can say and of NaN it cannot."""
    return float(np.mean([values[key] for values in metrics])) if metrics else None


def _shortened(text: str) -> str:
    """`text` in quotes, on one line whatever it holds."""
    return repr(text if len(text) <= _CHARACTERS_SHOWN else f"{text[:_CHARACTERS_SHOWN]}...")
