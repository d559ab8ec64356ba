"""`medreasoner-cli train`: dense, sft, segmenter, mix and grpo."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medreasoner_cli.extras import load
from medreasoner_cli.training import close_bar, show_lines, training_bar

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Train the models of a bundle: dense, then sft, then grpo; segmenter apart. Each run goes on from its last "
    "checkpoint.",
)


def _usable(device: str) -> str:
    """The device, if torch finds it; asked before the data are read, which takes a while."""
    if device != "cpu":
        torch = load("torch", extra="train")
        try:
            torch.zeros(1, device=device)
        except (AssertionError, NotImplementedError, RuntimeError) as err:
            raise typer.BadParameter(f"{device!r} cannot be used here ({str(err).splitlines()[0]})") from err
    return device


DataOption = Annotated[Path, typer.Option(help="Folder of the data set: index.jsonl, images, masks.")]
OutOption = Annotated[Path, typer.Option("--output", "--out", "-o", help="Folder for checkpoints and the log.")]
StepsOption = Annotated[int, typer.Option(min=1, help="Steps of the optimiser.")]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of all random choices.")]
StartOption = Annotated[Path | None, typer.Option(help="Checkpoint of the dense stage to start from.")]
MinutesOption = Annotated[
    float, typer.Option(min=0.1, help="End after so many minutes, even if steps are left; no end by default.")
]
CooldownOption = Annotated[
    float, typer.Option(min=0, max=1, help="Share of the run over which the learning rate falls to zero.")
]
RateOption = Annotated[float, typer.Option(min=0, help="Times the usual learning rate.")]
DecayOption = Annotated[float, typer.Option(min=0, help="Decay of the weights, in shares of the learning rate.")]
DeviceOption = Annotated[str, typer.Option(callback=_usable, help="Where to train: cpu, cuda or cuda:N.")]
WorkersOption = Annotated[
    int, typer.Option(min=0, help="Processes that prepare the images; 0: a thread. A GPU needs about ten.")
]
CacheOption = Annotated[Path | None, typer.Option(help="File (.npz) that keeps the masks' key points between runs.")]


def _whole_windows(size: int) -> int:
    if size <= 0 or size % 84:
        raise typer.BadParameter(f"{size} is not a multiple of 84, the side of the vision tower's windows")
    return size


SizeOption = Annotated[int, typer.Option(callback=_whole_windows, help="Side of the image in pixels, in steps of 84.")]
CompileOption = Annotated[
    bool, typer.Option("--compile/--no-compile", help="Whether to compile the model: slow start, faster steps.")
]


@app.callback()
def _lines(context: typer.Context) -> None:
    show_lines()
    context.call_on_close(close_bar)


@app.command()
def dense(
    data: DataOption,
    output: OutOption,
    steps: StepsOption,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 32,
    size: SizeOption = 168,
    start: StartOption = None,
    cache: CacheOption = None,
    compiled: CompileOption = False,
    minutes: MinutesOption = float("inf"),
    cooldown: CooldownOption = 0.35,
    weight_decay: DecayOption = 0.05,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    seed: SeedOption = 0,
) -> None:
    """Teach the vision tower where things are: the first stage.

    \b
    medreasoner-cli train dense --data grounding/ -o runs/dense --steps 6000
    """  # noqa: D301
    stage = load("medreasoner_train.pretrain", extra="train")
    loop = stage.LoopOptions(
        steps=steps,
        out=output,
        minutes=minutes,
        cooldown=cooldown,
        weight_decay=weight_decay,
        device=device,
        workers=workers,
        seed=seed,
        show=training_bar(),
    )
    stage.run(
        stage.DenseOptions(data=data, loop=loop, size=size, batch=batch, start=start, cache=cache, compiled=compiled)
    )


@app.command()
def sft(
    data: DataOption,
    output: OutOption,
    steps: StepsOption,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 12,
    branches: Annotated[int, typer.Option(min=1, help="Questions an image.")] = 4,
    unanswered: Annotated[
        int, typer.Option(min=0, help="More of them that are only read: what they mean, in a fraction of the time.")
    ] = 0,
    size: SizeOption = 252,
    start: Annotated[
        Path | None,
        typer.Option(help="Where to start: the dense stage's checkpoint, or the folder of a finished reasoner."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="tokenizer.json to use, to go on after the questions changed.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of a sentence encoder, such as all-MiniLM-L6-v2: teaches it meaning.")
    ] = None,
    frozen: Annotated[
        bool, typer.Option("--frozen-vision", help="Leave the vision tower as it is: new questions, in half the time.")
    ] = False,
    heads_first: Annotated[
        int, typer.Option(min=0, help="Steps in which the read-outs that help training learn alone; with a --start.")
    ] = 0,
    short_answers: Annotated[
        bool,
        typer.Option(
            "--short-answers",
            help="Give what is in every answer a token each, where the tokenizer of a --start has none.",
        ),
    ] = False,
    infer: Annotated[
        bool,
        typer.Option("--infer", help="Ask too for organs that a source leaves unlabelled and others let predict."),
    ] = False,
    rate: RateOption = 1.0,
    without: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Leave a source out, to measure on it; may be repeated.")
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(help="File NAME.npz to keep the masks' key points in; NAME.teacher.npz the teacher's embeddings."),
    ] = None,
    compiled: CompileOption = False,
    precision: Annotated[
        Literal["fp32", "bf16"], typer.Option(help="bf16: mixed, twice as fast on a GPU, AMX or AVX512_BF16.")
    ] = "fp32",
    minutes: MinutesOption = float("inf"),
    cooldown: CooldownOption = 0.35,
    weight_decay: DecayOption = 0.05,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    seed: SeedOption = 0,
) -> None:
    """Teach the reasoner to answer questions: the second stage; writes a Hugging Face checkpoint at its end.

    \b
    medreasoner-cli train sft --data grounding/ -o runs/sft --steps 6000 --start runs/dense/last.pt
    """  # noqa: D301
    stage = load("medreasoner_train.sft", extra="train")
    loop = stage.LoopOptions(
        steps=steps,
        out=output,
        lr=1e-3 * rate,
        matrix_lr=2e-3 * rate,
        minutes=minutes,
        cooldown=cooldown,
        weight_decay=weight_decay,
        device=device,
        workers=workers,
        seed=seed,
        show=training_bar(),
    )
    options = stage.SftOptions(images=batch, branches=branches, unanswered=unanswered, size=size, frozen=frozen)
    stage.run(
        stage.SftRun(
            data=data,
            loop=loop,
            options=options,
            start=start,
            tokenizer=tokenizer,
            teacher=teacher,
            without=tuple(without or ()),
            cache=cache,
            compiled=compiled,
            precision=precision,
            heads_first=heads_first,
            short_answers=short_answers,
            infer=infer,
        )
    )


@app.command()
def segmenter(
    data: DataOption,
    output: OutOption,
    steps: StepsOption,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 12,
    per_image: Annotated[int, typer.Option(min=1, help="Prompts an image.")] = 3,
    emphasis: Annotated[
        list[str] | None,
        typer.Option(metavar="SOURCE=FACTOR", help="Draw a source's images so many times as often; may be repeated."),
    ] = None,
    start: Annotated[Path | None, typer.Option(help="Folder of a finished segmenter to start from.")] = None,
    frozen_encoder: Annotated[bool, typer.Option("--frozen-encoder", help="Leave the image encoder as it is.")] = False,
    reasoner: Annotated[
        Path | None, typer.Option(help="Folder of a finished reasoner of nano's kind: its answers are prompts too.")
    ] = None,
    written: Annotated[float, typer.Option(min=0, max=1, help="Share of the images that it prompts.")] = 0.5,
    rate: RateOption = 1.0,
    cache: CacheOption = None,
    minutes: MinutesOption = float("inf"),
    cooldown: CooldownOption = 0.35,
    weight_decay: DecayOption = 0.05,
    device: DeviceOption = "cpu",
    workers: WorkersOption = 0,
    seed: SeedOption = 0,
) -> None:
    """Teach the segmenter to draw what a box and two points mean; writes a Hugging Face checkpoint at its end.

    \b
    medreasoner-cli train segmenter --data grounding/ -o runs/segmenter --steps 4000

    Afterwards, with the errors that the reasoner really makes:

    \b
    medreasoner-cli train segmenter --data grounding/ -o runs/segmenter2 --steps 600 --rate 0.3 \\
        --start runs/segmenter/checkpoint --frozen-encoder --reasoner runs/sft/checkpoint
    """  # noqa: D301
    stage = load("medreasoner_train.segmenter", extra="train")
    loop = stage.LoopOptions(
        steps=steps,
        out=output,
        lr=1e-3 * rate,
        matrix_lr=2e-3 * rate,
        minutes=minutes,
        cooldown=cooldown,
        weight_decay=weight_decay,
        device=device,
        workers=workers,
        seed=seed,
        show=training_bar(),
    )
    stage.run(
        stage.SegmenterOptions(
            data=data,
            loop=loop,
            images=batch,
            per_image=per_image,
            emphasis=_factors(emphasis or []),
            start=start,
            frozen_encoder=frozen_encoder,
            reasoner=reasoner,
            written=written,
            cache=cache,
        )
    )


@app.command()
def mix(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Folder of a finished checkpoint.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="Folder of one that was trained on from it.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    share: Annotated[float, typer.Option(min=0, max=1, help="Of the second's weights.")] = 0.5,
) -> None:
    """Average the weights of a checkpoint before and after it was taught something new.

    \b
    medreasoner-cli train mix runs/sft/checkpoint runs/sft2/checkpoint -o runs/mixed --share 0.7
    """  # noqa: D301
    print(load("medreasoner_train.mix", extra="train").mix(first, second, output, share=share))


@app.command()
def grpo(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="TOML file with the run's settings.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="In the place of [train] out.")] = None,
    device: Annotated[str | None, typer.Option(help="In the place of [train] device: cpu, cuda or cuda:N.")] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what memory it needs of each GPU.")] = False,
) -> None:
    """Teach the reasoner by reward: answers are drawn, judged, and the better of a group made likelier.

    \b
    medreasoner-cli train grpo recipes/nano-grpo.toml -o runs/grpo
    """  # noqa: D301
    import dataclasses

    settings = load("medreasoner_train.grpo_config", extra="train").read_config(config)
    changes: dict[str, object] = {}
    if output is not None:
        changes["out"] = output
    if device is not None:
        changes["device"] = device
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, **changes))
    if plan:
        print(load("medreasoner_train.grpo_run", extra="train").what_it_needs(settings))
        return
    if settings.scale.processes == 1:
        _usable(settings.train.device)
    elif load("medreasoner_train.distributed", extra="train").started() == 1:
        given = ["train", "grpo", *([] if output is None else ["-o", str(output)])]
        given += [*([] if device is None else ["--device", device]), str(config)]
        raise typer.Exit(load("medreasoner_train.launch", extra="train").launch(settings.scale, given))
    load("medreasoner_train.grpo_run", extra="train").run(settings, show=training_bar())


def _factors(pairs: list[str]) -> dict[str, float]:
    """``["a=2"]`` as ``{"a": 2.0}``."""
    factors = {}
    for pair in pairs:
        source, _, factor = pair.partition("=")
        try:
            factors[source] = float(factor)
        except ValueError:
            raise typer.BadParameter(f"--emphasis {pair!r}: expected SOURCE=FACTOR, as in axon_sem=4") from None
        if not 0 < factors[source] < float("inf"):
            raise typer.BadParameter(f"--emphasis {pair!r}: the factor must be positive")
    return factors
