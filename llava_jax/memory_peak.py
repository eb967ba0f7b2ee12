"""The most memory that a run has held so far."""

import resource
import sys

import jax

_GIB = 2**30


def memory_peak() -> dict[str, float]:
    """{"device_memory_peak_gib": ...} of the fullest device of this process, {"process_memory_peak_gib": ...} of
    the process where devices do not tell."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [own["peak_bytes_in_use"] for own in stats if "peak_bytes_in_use" in own]
    if peaks:
        return {"device_memory_peak_gib": max(peaks) / _GIB}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2) of each system
    return {"process_memory_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB}
