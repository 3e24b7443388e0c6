"""`diffc train`: a quantized backbone learns to make up for its rounding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples
from diffc.cli.guidance import guidance_option
from diffc.cli.hub import CacheDir, Revision, Subfolder, Token, Variant

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal
    from diffc.train.request import TrainResult

EXAMPLES = examples(
    "diffc train digits-sd3 --format nvfp4 -o build/trained",
    "diffc train digits-sdxl --format nvfp4 --method qat --data digits -o build/trained",
    "diffc train PIPELINE --format nvfp4 --method lora-qad --prompts-file prompts.txt --steps 2000 -o trained",
    "accelerate launch -m diffc train PIPELINE --format nvfp4 --mixed-precision bf16 -o trained",
)
_LEARN, _TEACH, _QUANT, _RUN = "Training", "The teacher", "Quantization", "How it runs"


def train_command(
    terminal: Terminal,
    model: Annotated[
        str, typer.Argument(help="An embedded model, a pipeline folder, or an id of the Hugging Face hub.")
    ],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="The format to train for.",
            autocompletion=completed(choices.formats),
            rich_help_panel=_QUANT,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The checkpoint to write.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="qad: distillation, needs no data. qat: on --data. lora-qad, lora-qat: low-rank additions alone.",
            rich_help_panel=_LEARN,
        ),
    ] = "qad",
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR",
            help="For qat: pictures with metadata.jsonl, or a .txt beside each; digits: the embedded set.",
            rich_help_panel=_LEARN,
        ),
    ] = "",
    steps: Annotated[
        int,
        typer.Option(
            "--steps",
            metavar="COUNT",
            help="Updates of the weights.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_LEARN,
        ),
    ] = 200,
    rate: Annotated[
        float | None,
        typer.Option(
            "--lr",
            metavar="RATE",
            help="Learning rate.",
            show_default="the best of 3e-5, 1e-4 and 3e-4 in a short trial",
            rich_help_panel=_LEARN,
        ),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option(metavar="COUNT", help="Rows a step.", min=1, max=choices.MOST, rich_help_panel=_LEARN),
    ] = 25,
    accumulate: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="Batches to one update of the weights.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_LEARN,
        ),
    ] = 1,
    rank: Annotated[
        int,
        typer.Option(
            metavar="RANK",
            help="Rank of the additions of the lora methods.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_LEARN,
        ),
    ] = 16,
    ema: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            help="Keep a running average of the weights, of which each step keeps this share; 0: none.",
            rich_help_panel=_LEARN,
        ),
    ] = 0.0,
    optimizer: Annotated[
        Literal["adamw", "adafactor"],
        typer.Option(help="adafactor keeps no state of the size of the weights.", rich_help_panel=_LEARN),
    ] = "adamw",
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What the teacher paints: prompts, as `diffc compile` takes them.",
            show_default="diffc's own prompts",
            rich_help_panel=_TEACH,
        ),
    ] = None,
    teacher_images: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="Images that the teacher paints; a fifth of them judges and is not trained on.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_TEACH,
        ),
    ] = 100,
    teacher_steps: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Denoising steps of each.",
            show_default="10; 4 for turbo models",
            min=1,
            max=choices.MOST,
            rich_help_panel=_TEACH,
        ),
    ] = None,
    guidance: Annotated[float | None, guidance_option(_TEACH)] = None,
    teacher_batch: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            help="Images that are painted at a time.",
            min=1,
            max=choices.MOST,
            rich_help_panel=_TEACH,
        ),
    ] = 10,
    image_size: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS", help="Height and width.", show_default="the model's", rich_help_panel=_TEACH
        ),
    ] = None,
    text_tokens: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Length of T5's text.",
            show_default="the pipeline's",
            min=1,
            max=choices.MOST,
            rich_help_panel=_TEACH,
        ),
    ] = None,
    from_checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="Calibration to begin with: a checkpoint folder, or a .pt of ModelOpt.",
            show_default="a new one",
            rich_help_panel=_QUANT,
        ),
    ] = None,
    quantize_mha: Annotated[
        bool, typer.Option("--quantize-mha", help="Attention's q, k and v in FP8.", rich_help_panel=_QUANT)
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Module paths that stay unquantized; repeatable.", rich_help_panel=_QUANT
        ),
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        typer.Option(help="Where to train; auto: the GPU if there is one.", rich_help_panel=_RUN),
    ] = "auto",
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"],
        typer.Option(help="accelerate's mixed precision.", rich_help_panel=_RUN),
    ] = "no",
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Compute activations twice instead of keeping them: less memory, the same gradients.",
            rich_help_panel=_RUN,
        ),
    ] = False,
    every: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            help="Steps between two judgements, from each of which a stopped training goes on.",
            show_default="a tenth of --steps",
            min=1,
            max=choices.MOST,
            rich_help_panel=_RUN,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="SEED", help="Of noise and batches.", min=0, max=2**31 - 1, rich_help_panel=_RUN
        ),
    ] = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Replace a checkpoint at -o.", rich_help_panel=_RUN)
    ] = False,
    revision: Revision = None,
    variant: Variant = None,
    subfolder: Subfolder = "",
    token: Token = None,
    cache_dir: CacheDir = None,
) -> None:
    """Train a quantized backbone, and write a checkpoint that `diffc compile --from-checkpoint` takes."""
    from diffc.compile.prompts import read_prompts
    from diffc.models.sources.source import HubOptions
    from diffc.quantize.options import QuantOptions
    from diffc.train.request import TrainRequest, check

    request = TrainRequest(
        model=model,
        output=output.expanduser().absolute(),
        format=format,
        method=method,
        data=data,
        steps=steps,
        rate=rate,
        batch_size=batch_size,
        accumulate=accumulate,
        rank=rank,
        ema=ema,
        every=every or 0,
        optimizer=optimizer,
        precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        teacher_images=teacher_images,
        teacher_steps=teacher_steps,
        guidance=guidance,
        teacher_batch=teacher_batch,
        image_size=image_size,
        text_tokens=text_tokens,
        prompts=None if prompts_file is None else read_prompts(prompts_file),
        options=QuantOptions(mha=quantize_mha, keep=tuple(keep or ())),
        from_checkpoint=from_checkpoint,
        seed=seed,
        device=device,
        force=force,
        hub=HubOptions(revision, variant, subfolder, token, cache_dir),
    )
    check(request)  # what is wrong is said at once: the import of torch takes seconds
    from diffc.train.run import train

    _told(train(request, terminal.ui), request.model, request.format, terminal)


def _told(result: TrainResult, model: str, format: str, terminal: Terminal) -> None:
    """Print what was gained, and the command that compiles it."""
    before, after = result.before.snr, result.after.snr
    terminal.line(f"Signal to noise on unseen calls: {before:.2f} dB calibrated, {after:.2f} dB trained")
    if result.trained:
        terminal.line(
            f"Kept: the weights after {result.after.step} of {result.curve[-1].step} steps at {result.rate:g}"
        )
    else:
        terminal.line(
            "No weights were better than calibration alone, which is what was written: try other rates"
        )
    terminal.line(f"Wrote {result.output} in {result.seconds:.0f} s. Compile it:")
    terminal.line(f"  diffc compile {model} --format {format} --from-checkpoint {result.output} -o OUTPUT")
    terminal.result(result.to_json())
