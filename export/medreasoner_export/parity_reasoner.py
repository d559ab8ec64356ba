"""Comparisons of a bundle's reasoner with transformers, stage by stage.

The graphs are fed as the runtime feeds them: its NumPy code works out rotary tables, windows and positions. Their
equality with transformers' own is thus part of what is compared.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from medreasoner import ops
from medreasoner._extras import require
from medreasoner.bundle import Bundle
from medreasoner.kernel_session import runs_without_graph
from medreasoner.providers import usable_cores
from medreasoner.reasoner.prompt import Prompt, load_tokenizer
from medreasoner.reasoner.rotary import prompt_positions, rotary_tables, text_positions
from medreasoner.reasoner.step import StepKernel, load_step, needs_no_graph
from medreasoner.reasoner.tower import TowerSession, load_tower
from medreasoner.reasoner.vision import VisionGrid, vision_grid
from medreasoner.reasoner.weights import load_weight
from medreasoner.spec import ReasonerSpec, StretchResize
from medreasoner_export.graph import BITS
from medreasoner_export.needs import give_back_memory
from medreasoner_export.quantise import BLOCK, Rounded, dequantise, dequantise_rows, quantise, quantise_rows
from medreasoner_export.report import KERNEL_TOLERANCES, ParityStage, compare, stated
from medreasoner_export.stored import StoredWeights
from medreasoner_export.streamed import TEXT, VISION, prompt_inputs, streamed_qwen, two_frames

__all__ = ["DecoderRun", "reasoner_stages"]

QUERY = "Which structure is shown here, and where does it lie?"
N_STEPS = 8
TOLERANCES = {"fp16": 0.02, "int8": 0.05, "int4": 0.05}
"""Accepted error of a graph by its precision. Float16 loses all but eleven bits anew in every layer; with rounded
matrices the activations are rounded to eight bits in every product."""
DYNAMIC_TOLERANCE = 0.1
"""Of a vision tower whose activations are rounded a tensor at a time, the few largest with the many small ones."""
CALIBRATED_TOLERANCE = 0.3
"""Accepted distance of a calibrated matrix from the checkpoint's: others than its own are further than one."""

Array = npt.NDArray[Any]


def reasoner_stages(
    bundle: Bundle, checkpoint_dir: Path, *, tolerance: float, seed: int, adapter: Path | None = None
) -> Iterator[ParityStage]:
    """Compare vision embeddings on two grids, hidden states of three ways to read a prompt, and greedy tokens.

    Parameters
    ----------
    bundle
        A loaded bundle.
    checkpoint_dir
        The checkpoint that the bundle was made of.
    tolerance
        Largest accepted error of float32, relative to the reference's largest value; other precisions have
        `TOLERANCES`. Rounded matrices are compared with the checkpoint's rounded in the same way, or, if they were
        calibrated, with their own values, and those with the checkpoint's.
    seed
        Of the images.
    adapter
        Folder of the LoRA adapter that was merged in.
    """
    torch = require("torch", extra="export", feature="The parity check")
    check = _Check(bundle, np.random.default_rng(seed))
    check.model = streamed_qwen(checkpoint_dir, adapter=adapter, change=check.rounded)
    vision = DYNAMIC_TOLERANCE if check.precisions[0] == "int8" else TOLERANCES.get(check.precisions[0], tolerance)
    decoder = TOLERANCES.get(check.precisions[1], tolerance)
    with torch.inference_mode():
        for rows, columns in check.grids():
            yield from check.vision(rows, columns, vision)
        yield from check.decoder(max(vision, decoder))  # it reads what the vision tower saw
    check.close()
    if check.own_levels is not None:
        yield check.own_levels.stage()


class _OwnLevels:
    """Gives the reference the matrices of a calibrated decoder, whose levels do not follow from the checkpoint alone.

    How far they are from the checkpoint's is a stage of its own: rounded to the nearest it would be a tenth.
    """

    def __init__(self, bundle: Bundle) -> None:
        path = bundle.path(bundle.spec.reasoner.graphs.decoder)
        self._stored = StoredWeights(onnx.load(str(path), load_external_data=False), path)
        spec = bundle.spec.reasoner
        self._before = {
            "q": 0,
            "k": spec.n_heads * spec.head_dim,
            "v": (spec.n_heads + spec.n_kv_heads) * spec.head_dim,
        }
        self._furthest = 0.0

    def __call__(self, name: str, weight: Array) -> Array:
        """The value of a weight of that name in transformers."""
        matrix, first = name.removeprefix(TEXT), 0
        layer, attention, part = matrix.partition(".self_attn.")
        if attention and part[0] in self._before and part.endswith(".weight") and part[1] == "_":
            matrix, first = f"{layer}.qkv.weight", self._before[part[0]]
        matrix = matrix.replace("gate_proj", "gate").replace("up_proj", "up")
        if not name.startswith(TEXT) or f"{matrix}.levels" not in self._stored:
            return weight
        levels, scales, zeros = (self._stored.array(f"{matrix}.{part}") for part in ("levels", "scales", "zeros"))
        found = dequantise(Rounded(bits=4, levels=levels, scales=scales, zero_points=zeros))
        found = found[first : first + len(weight)]
        distance = np.linalg.norm(found - weight) / (np.linalg.norm(weight) or 1.0)
        self._furthest = max(self._furthest, float(distance))
        return found

    def stage(self) -> ParityStage:
        """Of the matrices that were used."""
        return ParityStage(
            name="calibrated matrices against the checkpoint's", error=self._furthest, scale=1.0,
            tolerance=CALIBRATED_TOLERANCE, unit="norm of the difference, the worst",
        )  # fmt: skip


class DecoderRun:
    """One run of a decoder graph with caches shared between past and present, for `batch` sequences.

    Parameters
    ----------
    session
        An ``onnxruntime.InferenceSession``; None with a kernel.
    kernel
        Runs in the graph's place; one sequence only.
    """

    def __init__(self, session: Any, spec: ReasonerSpec, *, batch: int = 1, kernel: StepKernel | None = None) -> None:
        ort = require("onnxruntime", extra="cpu", feature="The parity check")
        self._session, self._spec = session, spec
        self.lengths = np.zeros(batch, np.int32)
        shape = (batch, spec.n_kv_heads, spec.max_length, spec.head_dim)
        names = [f"{kind}.{layer}" for kind in ("key", "value") for layer in range(spec.n_layers)]
        if session is not None:
            half = any(each.type == "tensor(float16)" for each in session.get_inputs())
        else:
            half = spec.step is not None and spec.step.vectors == "float16"
        dtype = np.float16 if half else np.float32
        hosts = [np.zeros(shape, dtype) for _ in names]
        self._caches = {name: ort.OrtValue.ortvalue_from_numpy(host) for name, host in zip(names, hosts, strict=True)}
        self._kernel = None
        if kernel is not None:
            self._kernel = kernel.decoder.open(hosts[: spec.n_layers], hosts[spec.n_layers :])

    def step(self, embeds: Array, positions: Array) -> Array:
        """Hidden states (batch, seq, hidden_dim) of new tokens.

        Parameters
        ----------
        embeds
            (batch, seq, hidden_dim) float32.
        positions
            (3, batch, seq) int64.
        """
        batch, seq, _ = embeds.shape
        spec = self._spec
        cos, sin = rotary_tables(
            positions.reshape(3, -1), head_dim=spec.head_dim, theta=spec.rope_theta, sections=spec.mrope_section
        )
        self.lengths += seq
        if self._kernel is not None:
            return ops.decoder_step([self._kernel], [int(self.lengths[0]) - seq], [seq], embeds[0], cos, sin)[None]
        inputs = {
            "inputs_embeds": embeds,
            "rotary_cos": cos,
            "rotary_sin": sin,
            "rotary_ids": np.arange(batch * seq).reshape(batch, seq),
            "seqlens_k": self.lengths - 1,
            "total_sequence_length": np.array(self.lengths.max(), np.int32),
        }
        binding = self._session.io_binding()
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        binding.bind_output("hidden_states")
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_{name}", cache)
            binding.bind_ortvalue_output(f"present_{name}", cache)
        self._session.run_with_iobinding(binding)
        hidden: Array = binding.get_outputs()[0].numpy()  # in the order of binding
        return hidden


class _Check:
    model: Any  # the reference

    def __init__(self, bundle: Bundle, generator: np.random.Generator) -> None:
        spec = bundle.spec.reasoner
        self.bundle, self.spec, self.generator = bundle, spec, generator
        self._opened: dict[str, Any] = {}
        self._tower: TowerSession | None = None
        self.own_levels = _OwnLevels(bundle) if "reasoner_calibration" in bundle.spec.source else None
        graphs = [bundle.path(name) for name in (spec.graphs.vision, spec.graphs.decoder)]
        self.precisions = tuple(stated(graph, "precision") or bundle.spec.precision for graph in graphs)
        self.tokenizer = load_tokenizer(str(bundle.path(spec.tokenizer)))
        self.embedding = load_weight(bundle.path(spec.embedding.file), spec.embedding)
        self.lm_head = load_weight(bundle.path(spec.lm_head.file), spec.lm_head)

    def session(self, graph: str) -> Any:
        """Of one graph of the bundle; two large ones at once would need the memory of the whole bundle."""
        ort = require("onnxruntime", extra="cpu", feature="The parity check")
        if graph not in self._opened:
            self._opened.clear()
            self._tower = None
            give_back_memory()
            path = str(self.bundle.path(graph))
            self._opened[graph] = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        return self._opened[graph]

    def close(self) -> None:
        """Let go of the graph and of the reference: they hold each other, and whatever is compared next needs room."""
        self._opened.clear()
        self._tower = self.model = None
        give_back_memory()

    def rounded(self, name: str, weight: Array) -> Array:
        """Gives the reference the matrices that graphs of few bits hold: what is left is the error of the graphs."""
        vision, decoder = self.precisions
        bits = BITS.get(decoder)  # type: ignore[call-overload]
        if weight.ndim != 2:
            return weight
        if self.own_levels is not None and name.startswith(TEXT):
            return self.own_levels(name, weight)
        if bits is not None and name.startswith(TEXT + "layers.") and weight.shape[1] % BLOCK == 0:
            return dequantise(quantise(weight, name, bits))
        if vision == "int8" and name.startswith((VISION + "blocks.", VISION + "merger.mlp.0")):
            return dequantise_rows(quantise_rows(weight, name))
        return weight

    def grids(self) -> list[tuple[int, int]]:
        """Rows and columns, in merged tokens: the model's own grid or a wide one, partial windows, less than one."""
        vision = self.spec.vision
        unit = vision.patch_size * vision.merge_size
        window = vision.window_size // unit
        own = (window + 1, 2 * window + 1)
        if isinstance(vision.resize, StretchResize):
            own = (vision.resize.height // unit, vision.resize.width // unit)
        return [own, (window + 2, window + 1), (1, 2)]

    def grid(self, rows: int, columns: int) -> VisionGrid:
        vision = self.spec.vision
        unit = vision.patch_size * vision.merge_size
        return vision_grid(
            height=rows * unit,
            width=columns * unit,
            patch=vision.patch_size,
            merge=vision.merge_size,
            window=vision.window_size,
            head_dim=vision.head_dim,
        )

    def images(self, rows: int, columns: int, count: int) -> tuple[Array, Array, Array]:
        """Random patches, and what the graph (count, n_tokens, D) and transformers make of them."""
        torch = require("torch", extra="export", feature="The parity check")
        vision = self.spec.vision
        merge = vision.merge_size
        shape = (count, rows * columns * merge**2, 3 * vision.patch_size**2)
        patches = self.generator.standard_normal(shape, dtype=np.float32)
        session = self.session(self.spec.graphs.vision)
        found = session.run(None, {"patches": patches, **self.grid(rows, columns).inputs()})[0]
        grid_thw = torch.tensor([[1, rows * merge, columns * merge]] * count)
        features = self.model.get_image_features(
            two_frames(self.model, patches), grid_thw, return_dict=True
        ).pooler_output
        return patches, found, torch.stack(list(features)).numpy()

    def vision(self, rows: int, columns: int, tolerance: float) -> Iterator[ParityStage]:
        """The graph's embeddings, and those of the kernel that does without it, where this machine has one."""
        patches, found, expected = self.images(rows, columns, 2)
        name = f"vision embeddings, {rows} x {columns} tokens, batch of 2"
        yield compare(name, found, expected, tolerance)
        tower = self.spec.tower
        if tower is not None and runs_without_graph(tower):
            if self._tower is None:
                path, out_dim = self.bundle.path(tower.file), self.spec.hidden_dim
                self._tower = load_tower(path, tower, self.spec.vision, out_dim=out_dim, n_threads=usable_cores())
            found = self._tower.run({"patches": patches, **self.grid(rows, columns).inputs()})["image_embeds"]
            limit = max(tolerance, KERNEL_TOLERANCES[self._tower.products])
            yield compare(f"{name}, without the graph", found, expected, limit)

    def decoder(self, tolerance: float) -> Iterator[ParityStage]:
        """Hidden states of a prompt read whole, in chunks and token by token; in float32, the tokens that follow."""
        precision = self.precisions[1]
        rows, columns = self.grids()[0]
        patches, embeds, _ = self.images(rows, columns, 1)
        prompt = Prompt(self.tokenizer, self.spec)
        text = self.spec.prompt.template.replace("{query}", QUERY)
        text = text.replace("{image}", self.spec.prompt.image_token * (rows * columns))
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        positions, after = prompt_positions(ids, prompt.image_token, rows, columns)
        is_image = np.array(ids) == prompt.image_token
        given = prompt_inputs(self.model, ids, prompt.image_token, patches, self.grid(rows, columns))
        reference = self.model(**given, use_cache=True, output_hidden_states=True, logits_to_keep=1)
        expected = reference.hidden_states[-1][0].numpy()
        inputs = self.embedding.embed(np.array(ids, np.int64))
        inputs[is_image] = embeds[0]
        n, half = len(ids), len(ids) // 2
        steps = [half, *[1] * (n - half)]
        kind = f" against the checkpoint's matrices in {precision[3:]} bits" if precision in BITS else ""

        found: Array = expected

        def compared(run: DecoderRun, name: str, sizes: list[int], limit: float) -> ParityStage:
            nonlocal found
            found = _in_parts(run, inputs, positions, sizes)
            return compare(f"hidden states, {name} of {n} tokens{kind}", found, expected, limit)

        session = self.session(self.spec.graphs.decoder)
        for name, sizes in (("prefill", [n]), ("chunked prefill", [half, n - half - 3, 3]), ("decode steps", steps)):
            run = DecoderRun(session, self.spec)
            yield compared(run, name, sizes, tolerance)
        rounds = self.spec.step is not None and self.spec.step.products == "int8"
        if self.spec.step is not None:
            del run, session
            self._opened.clear()  # a kernel packs weights of its own, and large ones fit the memory once
            give_back_memory()
            kernel = load_step(self.bundle.path(self.spec.step.file), self.spec, self.spec.step)
            limit = max(tolerance, TOLERANCES["int8"]) if rounds else tolerance
            if needs_no_graph(self.spec.step):
                yield compared(DecoderRun(None, self.spec, kernel=kernel), "prefill without the graph", [n], limit)
            run = DecoderRun(None, self.spec, kernel=kernel)
            yield compared(run, "decode steps without the graph", [*steps[: n - half - 2], 3], limit)
        if set(self.precisions) == {"fp32"} and not rounds:  # else two tokens that lie close may change places
            yield self._greedy(run, found[-1], after, reference)

    def _greedy(self, run: DecoderRun, hidden: Array, position: int, reference: Any) -> ParityStage:
        """Count of greedy tokens that differ, each side going on from its own."""
        torch = require("torch", extra="export", feature="The parity check")
        found, expected = [], []
        for step in range(N_STEPS):
            found.append(int(self.lm_head.logits(np.ascontiguousarray(hidden)).argmax()))
            expected.append(int(reference.logits[0, -1].argmax()))
            embeds = self.embedding.embed(np.array(found[-1:], np.int64))
            hidden = run.step(embeds[None], text_positions(position + step, 1)[:, None])[0, -1]
            reference = self.model(
                input_ids=torch.tensor([expected[-1:]]), past_key_values=reference.past_key_values, use_cache=True
            )
        wrong = sum(a != b for a, b in zip(found, expected, strict=True))
        return ParityStage(name=f"{N_STEPS} greedy tokens", error=wrong, scale=1.0, tolerance=0.0, unit="differing")


def _in_parts(run: DecoderRun, inputs: Array, positions: Array, sizes: list[int]) -> Array:
    """Hidden states (n, hidden_dim) of tokens given in runs of `sizes`."""
    parts, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        parts.append(run.step(inputs[None, part], positions[:, None, part])[0])
        start += size
    return np.concatenate(parts)
