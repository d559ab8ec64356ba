"""The tokens that every peer reads before it is timed."""

import random

__all__ = ["random_prompt"]


def random_prompt(length: int, vocab_size: int) -> list[int]:
    """Token ids, the same in every process; no special ones."""
    rng = random.Random(0)
    return [rng.randrange(1000, vocab_size) for _ in range(length)]
