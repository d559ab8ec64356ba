"""The tokens that every peer reads before it is timed."""

import random

__all__ = ["random_prompt"]


def random_prompt(length: int, vocab_size: int, run: int) -> list[int]:
    """Token ids, the same in every process and others in every run, so that nobody answers from a cache."""
    rng = random.Random(run)
    return [rng.randrange(1000, vocab_size) for _ in range(length)]
