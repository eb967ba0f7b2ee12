"""Conformance with the original LLaVA: each module compares one set of its recorded outputs with ours.

A module has `check(folder, tokenizer)`, which yields for every case its name and None, the difference as
text, or `Skipped` with the reason.
"""


class Skipped(str):
    """Why a case was not compared."""
