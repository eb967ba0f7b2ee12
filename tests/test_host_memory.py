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


MODULE = """
import os, sys
from llava_jax.host_memory import SETTING, start_anew_with_tunables
start_anew_with_tunables()
print(*sys.argv[1:], os.environ.get(SETTING), sep="|")
"""


@needs_glibc
def test_a_module_starts_anew_once_and_nothing_else_does(tmp_path):
    (tmp_path / "trains.py").write_text(MODULE)
    path = os.pathsep.join([os.getcwd(), str(tmp_path)])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment.pop(host_memory.SETTING, None)

    def told(*command: str, **setting: str) -> str:
        run = subprocess.run(
            [sys.executable, *command], env=environment | setting, capture_output=True, text=True, check=True
        )
        return run.stdout

    assert told("-m", "trains", "an argument", "") == f"an argument||{host_memory.KEPT_MEMORY}\n"
    own = {host_memory.SETTING: "glibc.malloc.perturb=0"}
    assert told("-m", "trains", **own) == f"{own[host_memory.SETTING]}\n"
    caller = "print('once'); import runpy; runpy.run_module('trains', run_name='__main__')"
    assert told("-c", caller) == "once\nNone\n"
