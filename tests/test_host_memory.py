"""What a process that trains asks of glibc."""

import os
import platform
import subprocess
import sys

import pytest

from llava_jax import host_memory

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries have no tunables"
)

STEPS = """
import resource, threading
import numpy as np

def take_step():
    np.ones(2**27, np.uint8)

faults = []
for _ in range(4):
    thread = threading.Thread(target=take_step)  # XLA's threads are not the main one either
    thread.start()
    thread.join()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])
"""


def page_faults(setting: str) -> int:
    """How often memory was asked of the system again by threads that took and freed 128 MB."""
    environment = os.environ | {host_memory.SETTING: setting}
    result = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


@needs_glibc
def test_freed_memory_is_kept():
    assert page_faults(host_memory.KEPT_MEMORY) < 50
    assert page_faults("") > 150  # at least one for each huge page of three steps


def test_memory_is_kept_on_cpus_alone(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert host_memory.tunables() == host_memory.HUGE_PAGES
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: name == "jax_plugins" or None)
    assert host_memory.tunables() == host_memory.HUGE_PAGES
    monkeypatch.setattr(host_memory.importlib.util, "find_spec", lambda name: None)
    assert host_memory.tunables() == host_memory.KEPT_MEMORY


@needs_glibc
def test_a_process_starts_anew_once():
    code = "from llava_jax.host_memory import *; start_anew_with_tunables(); print(sys.argv[1], os.environ[SETTING])"
    environment = {key: value for key, value in os.environ.items() if key != host_memory.SETTING}
    command = [sys.executable, "-c", code, "argument"]
    told = [
        subprocess.run(command, env=environment | more, capture_output=True, text=True).stdout.split()
        for more in ({"JAX_PLATFORMS": "cpu"}, {host_memory.SETTING: "glibc.malloc.perturb=0"})
    ]
    assert told[0][0] == "argument" and "arena_max=1" in told[0][1]
    assert told[1] == ["argument", "glibc.malloc.perturb=0"]
