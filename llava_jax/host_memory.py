"""How glibc hands memory to a process that trains. JAX is not imported: glibc reads its settings at the start only."""

import contextlib
import importlib.util
import os
import platform
import sys

SETTING = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# Besides, buffers of less than 256 MB stay in one heap, which all threads share, instead of going back to the system.
# Larger ones would lie there several times: glibc seldom finds an aligned place for them where one has been freed.
KEPT_MEMORY = ":".join(
    [
        HUGE_PAGES,
        f"glibc.malloc.mmap_threshold={2**28}",
        f"glibc.malloc.trim_threshold={2**30}",
        "glibc.malloc.arena_max=1",
    ]
)


def tunables() -> str:
    """glibc's settings for this machine.

    XLA frees a step's buffers when the step ends. On a CPU the system would find and clear that memory again for every
    step, so the process keeps it. Where there may be an accelerator the host's buffers are batches and checkpoints,
    which go back.
    """
    return KEPT_MEMORY if _only_cpus() else HUGE_PAGES


def start_anew_with_tunables() -> None:
    """Starts this process, a `python -m MODULE`, anew with `tunables`.

    Does nothing if it has some already, if its C library is not glibc, or if it was not started so: a notebook would
    lose its state, and a script from standard input has been read. Nothing is lost then but time.
    """
    started_by_name = getattr(sys.modules["__main__"], "__spec__", None) is not None
    if platform.libc_ver()[0] == "glibc" and SETTING not in os.environ and started_by_name and sys.executable:
        os.environ[SETTING] = tunables()
        with contextlib.suppress(OSError):
            os.execv(sys.executable, sys.orig_argv)


def _only_cpus() -> bool:
    """Whether JAX can find no accelerator: it is told so, or has no plugin for any."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.strip().lower() == "cpu"
    return not any(importlib.util.find_spec(plugin) for plugin in ("libtpu", "jax_plugins"))
