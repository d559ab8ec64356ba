"""Our side of ``large_decode.py``: the runtime's decoder, step by step."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from random_prompt import random_prompt
from serving import run_number, serve, versions

from medreasoner import Grounder
from medreasoner.ops import AnswerState, simd_level
from medreasoner.reasoner.decoder import Decoder
from medreasoner.reasoner.generate import Sequencer, choose
from medreasoner.reasoner.grammar import GrammarBook

MODES = {"allowed rows": "a token is chosen from the rows that the grammar allows", "full logits": "from all rows"}


def first_number(grammars: GrammarBook) -> AnswerState:
    """The grammar where an answer's first number is chosen."""
    state = grammars.grammar(252).start(252, 252)
    state.forced()
    while state.at_absent_choice:
        ways = []
        for token in state.allowed():
            ahead = state.copy()
            ahead.accept(int(token))
            if not ahead.absent:
                ways.append(ahead)
        state = ways[0]
        state.forced()
    return state


def last_state(sequencer: Sequencer, decoder: Decoder, tokens: list[int]) -> Any:
    """Hidden state of the last of some tokens, which are run at once."""
    feeding = sequencer.feed(tokens)
    (states,) = decoder.run([next(feeding)])
    try:
        feeding.send(states)
    except StopIteration as end:
        return end.value[-1]
    raise AssertionError("tokens are one step")


def main(folder: str, threads: int, n_prompt: int, n_steps: int, weight_bytes: int) -> None:
    def start() -> tuple[Mapping[str, Any], Callable[[str], Mapping[str, Any]]]:
        grounder = Grounder.load(Path(folder), device="cpu", n_threads=threads, cache_dir=Path(folder).parent / "cache")
        reasoner = grounder._engine.reasoner
        decoder, embedding, lm_head = reasoner._decoder, reasoner._embedding, reasoner._lm_head
        state = first_number(reasoner._writer._grammars)
        n_rows = len(state.allowed())

        def run(line: str) -> Mapping[str, Any]:
            mode = line.partition(" ")[2]
            prompt = random_prompt(n_prompt, reasoner.spec.vocab_size, run_number(line))
            cache = decoder.open_cache()
            cache.length, cache.holds = 0, None
            at = perf_counter()
            sequencer = Sequencer(decoder, embedding, cache, 0)
            hidden = last_state(sequencer, decoder, prompt)
            steps: list[float] = []
            while len(steps) <= n_steps:
                if mode == "full logits":
                    token = int(np.argmax(lm_head.logits(hidden)))
                else:
                    token, _ = choose(state.copy(), hidden, lm_head, None)
                now = perf_counter()
                steps.append(now - at)
                at = now
                if len(steps) <= n_steps:
                    hidden = last_state(sequencer, decoder, [token])
            decoder.close_cache(cache)
            return {"prompt_s": steps[0], "steps_s": steps[1:]}

        head = lm_head.values
        facts = {
            "versions": versions(["medreasoner", "onnxruntime", "numpy"]),
            "settings": f"{threads} threads, {simd_level()}; decoder {grounder.bundle.spec.precision} "
            f"{'by its graph' if decoder._step is None else 'by a kernel'}, "
            f"language head {lm_head.dtype} outside of the graph; {n_rows} rows allowed of {len(head)}",
            "weight_bytes": {
                "allowed rows": weight_bytes,
                "full logits": weight_bytes + head.nbytes,
            },
        }
        return facts, run

    serve(start)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:6]))
