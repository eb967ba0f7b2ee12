"""Real processes on this machine that train together: the same losses as one, the same refusal, the same end."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llava_jax import processes
from llava_jax.errors import ConfigError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def start(shapes_dataset, tmp_path, compile_cache):
    """start(number of processes, flags per process) -> the processes, which share four devices."""
    running = []

    def start(count: int, *flags: str, each: dict[int, tuple[str, ...]] | None = None, workdir="run"):
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            port = sock.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // count}",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        for process in range(count):
            cluster = (
                f"--coordinator=127.0.0.1:{port}",
                f"--num_processes={count}",
                f"--process_id={process}",
            )
            command = [
                sys.executable,
                "-m",
                "llava_jax.train",
                f"--config={ROOT}/tests/tiny_recipe.py:{shapes_dataset}",
                f"--workdir={tmp_path / workdir}",
                "--config.mesh.fsdp=-1",
                *(cluster if count > 1 else ()),
                *flags,
                *(each or {}).get(process, ()),
            ]
            running.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        return running[-count:]

    yield start
    for process in running:
        process.kill()
        process.communicate()


def finish(running, timeout=200) -> list[tuple[int, str]]:
    """Exit code and stderr of each."""
    return [
        (process.returncode, err) for process in running for _, err in [process.communicate(timeout=timeout)]
    ]


def losses(workdir) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_train_evaluate_and_export_as_one_does(start, shapes_dataset, tmp_path):
    flags = (
        "--config.train.accumulation_steps=2",
        f"--config.evaluate.path={shapes_dataset}/questions_test.jsonl",
        f"--config.evaluate.image_folder={shapes_dataset}/images",
        "--config.evaluate.batch_size=4",
        "--config.evaluate.max_new_tokens=2",
        "--config.evaluate.samples=2",
        "--config.evaluate.predict_with_generate=True",
        "--config.export.layout=llava-hf",
        "--config.data.val_size=8",
        "--config.train.eval_steps=2",
        "--config.train.load_best_model_at_end=True",
        "--config.train.metric_for_best_model=eval_token_accuracy",
    )
    alone = start(1, *flags, workdir="alone")
    assert [code for code, _ in finish(alone)] == [0]
    several = start(2, *flags)
    results = finish(several)
    assert [code for code, _ in results] == [0, 0], results
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "alone")
    )
    assert len(ours) == 6
    for mine, other in zip(ours, theirs, strict=True):
        for key in ("step", "loss", "grad_norm", "num_supervised_tokens", "eval_loss", "eval_token_accuracy"):
            np.testing.assert_allclose(mine.get(key, 0), other.get(key, 0), rtol=1e-5, err_msg=key)
    answers = [
        json.loads((tmp_path / run / "all_results.json").read_text())["eval_accuracy"]
        for run in ("run", "alone")
    ]
    assert answers[0] == answers[1]
    for name in ("generated_predictions.jsonl", "answers/2.jsonl", "answers/4.jsonl"):
        assert (tmp_path / "run" / name).read_text() == (tmp_path / "alone" / name).read_text()
    states = [json.loads((tmp_path / run / "trainer_state.json").read_text()) for run in ("run", "alone")]
    assert [state["global_step"] for state in states] == [4, 4]
    assert len(states[0]["log_history"]) == len(states[1]["log_history"]) == 7
    assert (tmp_path / "run/export/model.safetensors").stat().st_size == (
        tmp_path / "alone/export/model.safetensors"
    ).stat().st_size


@pytest.mark.slow
def test_four_processes_continue_what_one_began(start, tmp_path):
    assert finish(start(1, "--config.train.max_steps=6", workdir="whole"))[0][0] == 0
    stopped = start(1, "--config.train.max_steps=6", "--config.checkpoint.save_steps=3")
    while not list(tmp_path.glob("run/checkpoints/3/**/commit_success.txt")):
        assert stopped[0].poll() is None
        time.sleep(0.05)
    stopped[0].kill()
    assert [code for code, _ in finish(start(4, "--config.train.max_steps=6"))] == [0] * 4
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "whole"), rtol=1e-5)


def test_processes_that_differ_are_refused_by_key_before_anything_is_compiled(start, tmp_path):
    other = {1: ("--config.optimizer.learning_rate=0.5",)}
    results = finish(start(2, each=other))
    assert [code for code, _ in results] == [10, 10]
    for _, err in results:
        assert re.search(r"optimizer.learning_rate is 0.5 on process 1, 0.001 on process 0", err)
    assert not (tmp_path / "run").exists()


def test_an_error_on_one_process_is_told_by_all(start):
    results = finish(start(2, each={1: ("--config.data.image_folder=/nowhere",)}))
    assert [code for code, _ in results] == [results[1][0]] * 2
    assert "/nowhere" in results[1][1]
    assert re.search(r"error: process 1: .*/nowhere", results[0][1])


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGSTOP, signal.SIGKILL], ids=["stopped", "killed"])
def test_when_one_process_dies_the_others_end_soon_and_name_it(start, tmp_path, how):
    running = start(2, "--config.train.max_steps=100000", "--config.train.num_epochs=1000")
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert running[0].poll() is None, running[0].communicate()
        time.sleep(0.1)
    running[1].send_signal(how)  # a stopped process keeps its connections open
    before = time.monotonic()
    _, err = running[0].communicate(timeout=processes.SILENCE + 60)
    assert time.monotonic() - before < processes.SILENCE + 30
    assert running[0].returncode == 14
    assert re.search(r"process 1: no sign of life on \S+ for", err)


@pytest.mark.slow
@pytest.mark.parametrize("limited", [[1], [0, 1]], ids=["one", "both"])
def test_a_save_that_fails_on_one_process_alone_ends_the_run_and_on_all_does_not(start, tmp_path, limited):
    running = start(2, "--config.checkpoint.save_steps=2", "--config.train.max_steps=5")
    while not (tmp_path / "run/metrics.jsonl").exists():
        assert running[0].poll() is None, running[0].communicate()
        time.sleep(0.05)
    for process in limited:
        resource.prlimit(running[process].pid, resource.RLIMIT_FSIZE, (4096, 4096))
    results = finish(running)
    assert [code for code, _ in results] == [12, 12], results
    if limited == [1]:
        assert "could not be saved by process 1 alone" in results[0][1]
    else:
        assert "checkpoint 2 could not be saved" in results[0][1]
        assert "The last state could not be saved" in results[0][1]


def test_a_process_is_silent_when_its_sign_of_life_stays_the_same(monkeypatch):
    ended = []
    monkeypatch.setattr(processes, "_end", lambda *how: ended.append(how))
    clock = iter([0, 50, 100, 150, 161])
    monkeypatch.setattr(processes.time, "monotonic", lambda: next(clock))
    watcher = processes._Watcher()
    for beat in ("a 1", "a 2", "a 2", "a 2"):  # seen at 0, 50, 100 and 150 s
        watcher._look_for_silent({"x/3": beat})
    assert ended == [(3, 14, ended[0][2])] and "on a" in ended[0][2]


ENDING = """
import atexit, time
atexit.register(print, "JAX leaves")  # as its own farewell is registered, before ours
import jax
from llava_jax import processes

class Client:
    def key_value_set(self, *_, **__):
        print("asks", flush=True)
        time.sleep(0.5)
        print("is answered", flush=True)

    def key_value_dir_get(self, _):
        return []

jax.distributed.initialize, jax.process_count, jax.process_index = print, lambda: 2, lambda: 0
processes._client = Client
processes.start("host:1", 2, 0)
time.sleep(0.2)
"""


def test_at_the_end_the_watcher_is_not_interrupted_while_it_asks_the_others():
    done = subprocess.run(
        [sys.executable, "-c", ENDING], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines()[1:] == ["asks", "is answered", "JAX leaves"], done.stderr


def test_what_open_mpi_5_needs_is_told(monkeypatch):
    def initialize(*_):
        raise RuntimeError(
            "Open MPI 5 or newer requires mpi4py for distributed initialization."
        )  # as JAX 0.11.2 does

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    with pytest.raises(
        ConfigError, match=r"pip install mpi4py.*JAX_LOCAL_DEVICE_IDS=\$OMPI_COMM_WORLD_LOCAL_RANK"
    ):
        processes.start()


def test_processes_that_a_launcher_started_do_not_train_each_by_itself(monkeypatch):
    def find_none(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(processes.jax.distributed, "initialize", find_none)
    for size in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(size, raising=False)
    processes.start()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    processes.start()
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError,
        match=r"OMPI_COMM_WORLD_SIZE=2: .*--process_id=\$OMPI_COMM_WORLD_RANK.*_IDS=\$OMPI_COMM_WORLD_LOCAL_RANK",
    ):
        processes.start()


def test_one_process_needs_no_agreement():
    assert processes.exchange("x", 3) == [3]
    processes.agree({"a": 1})
    with processes.together("x"):
        pass
    assert processes.from_first("x", [1]) == [1]
