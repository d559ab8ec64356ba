"""Engines of rollouts by name."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from medreasoner.errors import GenerationError
from medreasoner_train.rollout import Rollouts

__all__ = ["EngineName", "make_rollouts"]

EngineName = Literal["torch", "runtime", "transformers", "vllm"]
KNOWN = (*get_args(EngineName), *(f"ray:{name}" for name in get_args(EngineName) if name != "torch"))


def make_rollouts(
    name: str,
    checkpoint: str | Path,
    *,
    torch_engine: Callable[[], Rollouts] | None = None,
    workers: int = 2,
    resources: dict[str, Any] | None = None,
    **options: Any,
) -> Rollouts:
    """An engine for the policy in a checkpoint's folder.

    Parameters
    ----------
    name
        ``"torch"``: the trainer's own model; ``"runtime"``: our ONNX runtime; ``"transformers"``: its ``generate``;
        ``"vllm"``; and before the last three ``"ray:"``: Ray workers with one each.
    checkpoint
        Folder that ``save_pretrained`` wrote, with ``tokenizer.json`` and ``medreasoner.json``.
    torch_engine
        Makes the engine of ``"torch"``, which is about the trainer's objects and not a folder.
    workers, resources
        Of ``"ray:..."``; see :class:`medreasoner_train.ray_rollouts.RayRollouts`.
    **options
        Of the engine's class.

    Raises
    ------
    GenerationError
        If there is no engine of that name.
    MissingExtraError
        If a package is missing; the message names the extra.
    BundleError
        If the folder is no checkpoint.
    """
    if name == "torch" and torch_engine is not None:
        return torch_engine()
    if name == "runtime":
        from medreasoner_train.runtime_rollouts import RuntimeRollouts

        return RuntimeRollouts(checkpoint, **options)
    if name == "transformers":
        from medreasoner_train.hub_rollouts import TransformersRollouts

        return TransformersRollouts(checkpoint, **options)
    if name == "vllm":
        from medreasoner_train.vllm_rollouts import VllmRollouts

        return VllmRollouts(checkpoint, **options)
    if name in KNOWN and name.startswith("ray:"):
        from medreasoner_train.ray_rollouts import RayRollouts

        make = partial(make_rollouts, name.removeprefix("ray:"), Path(checkpoint).resolve(), **options)
        return RayRollouts(make, workers=workers, resources=resources)
    known = ", ".join(each for each in KNOWN if each != "torch" or torch_engine is not None)
    raise GenerationError(f"rollouts: no engine {name!r:.60}; known here: {known}")
