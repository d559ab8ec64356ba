"""What prompt-lookup speculation could save of a thought's steps, at the very most::

    medreasoner-cli eval nano GROUNDING_SET --think --every 3 --no-controls -o runs/think
    python benchmarks/prompt_lookup.py models/nano/reasoner/tokenizer.json runs/think/rows.jsonl

Speculation guesses the next tokens from where the last `n` occurred before, in the question or the thought itself, and
reads them all in one step; those that greedy decoding would have chosen are kept, with the token after them. The
thoughts are written already, so the steps can be counted without running a model; that a step over several tokens
takes as long as one over a single token is assumed in its favour.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from medreasoner.reasoner.prompt import load_tokenizer


def steps(prompt: Sequence[int], thought: Sequence[int], *, n: int, most: int) -> int:
    """Steps that write `thought` behind `prompt`, with guesses of up to `most` tokens after a match of `n`.

    >>> steps([1, 2, 3, 4, 5], [1, 2, 3, 4, 9], n=2, most=4)  # 1, 2, then 3 and 4 with the 9 that follows
    3
    """
    written = list(prompt)
    at = count = 0
    while at < len(thought):
        guess = lookup(written, n, most)
        right = 0
        while right < min(len(guess), len(thought) - at - 1) and guess[right] == thought[at + right]:
            right += 1
        written += thought[at : at + right + 1]
        at += right + 1
        count += 1
    return count


def lookup(written: Sequence[int], n: int, most: int) -> list[int]:
    """The tokens that followed the latest earlier occurrence of the last `n`."""
    tail = list(written[-n:])
    for start in range(len(written) - n - 1, -1, -1):
        if list(written[start : start + n]) == tail:
            return list(written[start + n : start + n + most])
    return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer", type=Path, help="tokenizer.json")
    parser.add_argument("rows", type=Path, help="rows.jsonl of `eval --think`")
    options = parser.parse_args()
    tokenizer = load_tokenizer(str(options.tokenizer))
    rows = [json.loads(line) for line in options.rows.read_text(encoding="utf-8").splitlines()]
    pairs = [
        (tokenizer.encode(row["query"]).ids, tokenizer.encode(row["reasoning"]).ids)
        for row in rows
        if row.get("reasoning")
    ]
    total = sum(len(thought) for _, thought in pairs)
    print(f"{len(pairs)} thoughts of {total / len(pairs):.1f} tokens")
    for n in (1, 2, 3):
        for most in (2, 5, 10):
            needed = sum(steps(prompt, thought, n=n, most=most) for prompt, thought in pairs)
            print(f"match of {n}, up to {most:2d} guessed: {total / needed:.3f} tokens a step")


if __name__ == "__main__":
    main()
