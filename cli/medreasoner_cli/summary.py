"""A bundle's manifest, in words."""

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["read_manifest", "summary_lines"]


def read_manifest(name: str) -> dict[str, Any]:
    """Content of a bundle's manifest, checked for its form but not against the files.

    Raises
    ------
    BundleError
        If there is no such bundle, or its manifest is malformed.
    """
    import json

    from medreasoner.bundle import find_bundle
    from medreasoner.errors import BundleError
    from medreasoner.manifest import parse_manifest
    from medreasoner_cli.folders import bundle_path

    path = find_bundle(bundle_path(name)) / "manifest.json"
    try:
        text = path.read_bytes()
    except OSError as err:
        raise BundleError(f"{path}: {err.strerror}") from err
    parse_manifest(text)
    manifest: dict[str, Any] = json.loads(text)
    return manifest


def summary_lines(manifest: Mapping[str, Any]) -> list[str]:
    """What people ask of a bundle, a fact a line."""
    reasoner, segmenter, licence = manifest["reasoner"], manifest["segmenter"], manifest["licence"]
    size = sum(file["size_bytes"] for file in manifest["files"].values())
    resize, answer = reasoner["vision"]["resize"], reasoner["answer"]
    absent = "no" if answer["absent"] is None else f"yes, above P = {reasoner['absent_threshold']}"
    lines = [
        f"{manifest['name']} {manifest['version']}  {manifest['description']}".rstrip(),
        f"  size       {size / 1e6:.1f} MB in {len(manifest['files'])} files, {manifest['precision']}"
        + _on_cpu(manifest),
        f"  reasoner   {reasoner['architecture']}, {reasoner['n_layers']} layers of {reasoner['hidden_dim']}, "
        f"vocabulary {reasoner['vocab_size']}, image {_resize(resize)}",
        f"  segmenter  {segmenter['architecture']}, image {_resize(segmenter['resize'])}, "
        f"prompts {segmenter['prompts']}, masks {segmenter['mask_size']} px",
        f"  absent     {absent}",
        f"  licence    {licence['weights']}",
    ]
    if licence["notice"]:
        lines.append(f"  notice     {licence['notice']}")
    for title in ("training", "quality"):
        lines += [f"  {title}", *_tree(manifest[title], "    ")] if manifest[title] else [f"  {title:<9}  not stated"]
    return lines


def _resize(resize: Mapping[str, Any]) -> str:
    rest = " ".join(f"{key} {value}" for key, value in resize.items() if key != "rule")
    return f"{resize['rule']} {rest}"


def _tree(value: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, each in value.items():
        if isinstance(each, dict):
            yield f"{indent}{key}"
            yield from _tree(each, indent + "  ")
        else:
            text = f"{each:.3f}" if isinstance(each, float) else each
            yield f"{indent}{key}: {text}"


def _on_cpu(manifest: Mapping[str, Any]) -> str:
    """Which graphs are others on the CPU."""
    names = [*manifest["reasoner"].get("cpu_graphs", {}), *manifest["segmenter"].get("cpu_graphs", {})]
    return f", with graphs of its own for the CPU ({', '.join(names)})" if names else ""
