"""The part of `medreasoner.ops` that runs decoders."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from medreasoner import _kernels
from medreasoner._array_checks import check_array
from medreasoner._kernels import AnswerWriting, DecoderSequence, Interrupt
from medreasoner.errors import ArrayError

__all__ = ["WeightDtype", "absent_share", "decoder_step", "draw_token", "write_answers"]

WeightDtype = Literal["float32", "float16", "bfloat16"]
"""Of a weight matrix; bfloat16 is held as uint16 bit patterns, since NumPy has no such type."""


def decoder_step(
    sequences: Sequence[DecoderSequence],
    pasts: Sequence[int],
    counts: Sequence[int],
    embeds: NDArray[np.float32],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    n_out: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Run more tokens of one or more sequences through a decoder; their keys and values are appended.

    Parameters
    ----------
    sequences
        Of one `DecoderStep`, each at most once.
    pasts
        Tokens that each has in its buffers.
    counts
        New tokens of each.
    embeds
        (n, hidden_dim) float32, n in all, those of the first sequence first.
    cos, sin
        (n, head_dim / 2) float32 rotary tables of the same tokens.
    n_out
        Of how many of each one's last tokens hidden states are asked for; None: of all.

    Returns
    -------
    NDArray[np.float32]
        (n, hidden_dim), or (sum of n_out, hidden_dim) float32. What a sequence gets depends neither on the others nor
        on threads, to the last bit.
    """
    try:
        return _kernels.decoder_step(sequences, pasts, counts, embeds, cos, sin, n_out)
    except (ValueError, TypeError) as err:
        raise ArrayError(f"decoder_step: {str(err).splitlines()[0]}") from err


def absent_share(logits: NDArray[np.float32], leads_to_absent: NDArray[np.bool_]) -> float:
    """Probability that the target is absent: of the tokens that say so, in the softmax of finite logits (K,) float32.

    >>> round(absent_share(np.array([0, 2], np.float32), np.array([False, True])), 4)
    0.8808
    """
    check_array(logits, "logits", "(K,)", 1, np.dtype(np.float32))
    check_array(leads_to_absent, "leads_to_absent", "(K,)", 1, np.dtype(np.bool_))
    try:
        return _kernels.absent_share(logits, leads_to_absent)
    except ValueError as err:
        raise ArrayError(f"absent_share: {err}") from err


def draw_token(logits: NDArray[np.float32], temperature: float, share: float) -> int:
    """Index into logits (K,) float32 that a number `share` in [0, 1) draws from their softmax at a temperature above 0.

    >>> draw_token(np.log(np.array([1, 3], np.float32)), 1.0, 0.3)
    1
    """
    check_array(logits, "logits", "(K,)", 1, np.dtype(np.float32))
    try:
        return _kernels.draw_token(logits, temperature, share)
    except ValueError as err:
        raise ArrayError(f"draw_token: {err}") from err


def write_answers(
    answers: Sequence[AnswerWriting],
    embedding: tuple[NDArray[Any], WeightDtype],
    head: tuple[NDArray[Any], WeightDtype],
    cos: NDArray[np.float32],
    sin: NDArray[np.float32],
    interrupt: Interrupt,
    seconds: float | None,
    n_threads: int = 1,
) -> None:
    """Choose tokens, take those that the grammar forces and run the decoder, again and again, for one or more answers.

    Ends when an answer is done, or cannot go on here: where absent is a choice that it does not make here, logits are
    not finite, or there is no room. That one is then as it was before, and its next choice must be made otherwise.

    Parameters
    ----------
    answers
        Of one `DecoderStep`, each with a sequence and a state of its own. Each gets what it would get alone.
    embedding, head
        (V, hidden_dim) matrices with their element types.
    cos, sin
        (n_positions, head_dim / 2) float32 rotary tables of text.
    interrupt
        Ends it between two steps, from another thread.
    seconds
        Ends it after the first step beyond them; None: never.
    n_threads
        That share many answers, where a step is not worth splitting.
    """
    try:
        _kernels.write_answers(answers, *embedding, *head, cos, sin, interrupt, seconds, n_threads)
    except (ValueError, TypeError) as err:
        raise ArrayError(f"write_answers: {str(err).splitlines()[0]}") from err
