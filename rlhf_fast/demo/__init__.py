"""The whole pipeline on a little language task whose true utility is known."""

from rlhf_fast.demo.pipeline import main

__all__ = ["main"]
