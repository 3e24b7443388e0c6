"""`diffc mix`: several formats in one model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffc.cli import choices
from diffc.cli.choices import completed
from diffc.cli.command import examples
from diffc.errors import UsageError

if TYPE_CHECKING:
    from diffc.cli.terminal import Terminal

EXAMPLES = examples(
    "diffc mix PIPELINE --bits 5.5 -o mixed",
    "diffc compile PIPELINE --format mixed --from-checkpoint mixed -o out",
    "diffc mix PIPELINE --plan mixed.plan.json -o edited",
)


def mix_command(
    terminal: Terminal,
    model: Annotated[
        str,
        typer.Argument(
            help="A pipeline folder, or an embedded model.", autocompletion=completed(choices.models)
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="The calibration to write, for --from-checkpoint."
        ),
    ],
    bits: Annotated[
        float | None,
        typer.Option(
            metavar="BITS", help="Bits a weight on average, of the layers that can be quantized.", min=1
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of all weights of the backbone, such as 6GB.")
    ] = None,
    psnr: Annotated[
        float | None,
        typer.Option(
            metavar="DB", help="The smallest size whose pictures are that near to the unquantized model's."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A plan that an earlier call wrote, edited; nothing is measured."),
    ] = None,
    format: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FORMAT",
            help="A format that layers may have; repeatable.",
            show_default="nvfp4, fp8, int8",
            autocompletion=completed(choices.formats),
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Prompts, as `diffc compile` takes them.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(metavar="COUNT", help="Denoising steps.", min=2, max=choices.MOST)
    ] = None,
    batch_size: Annotated[
        int, typer.Option(metavar="COUNT", help="Prompts at a time.", min=1, max=choices.MOST)
    ] = 4,
    image_size: Annotated[
        int | None, typer.Option(metavar="PIXELS", help="Size of the images.", min=1, max=choices.MOST)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="SEED", help="Seed of the noise.", min=0, max=2**32 - 1)] = 0,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw quality against size, beside every format by itself."),
    ] = None,
) -> None:
    """Choose a format for every layer: the smallest error of the output within a size."""
    from diffc.commands.bench.output import check_folder, check_plot
    from diffc.commands.mix.request import MixRequest
    from diffc.commands.mix.run import lines, mix
    from diffc.compile.prompts import read_prompts
    from diffc.output_files import check_parent
    from diffc.quantize.folder import check_place
    from diffc.quantize.formats import find_format

    check_plot(plot)
    check_folder(plot)
    check_parent(output)
    check_place(output)
    formats = tuple(find_format(name).name for name in format or ("nvfp4", "fp8", "int8"))
    request = MixRequest(
        model,
        output,
        bits,
        None if size is None else bytes_of(size),
        plan,
        formats,
        None if prompts_file is None else read_prompts(prompts_file),
        steps,
        batch_size,
        image_size,
        seed,
        plot,
        psnr=psnr,
    )
    found = mix(request, terminal.ui)
    for line in lines(found):
        terminal.line(line)
    terminal.line(f"Compile it: diffc compile {model} --format mixed --from-checkpoint {output} -o OUT")
    terminal.result([{"name": m.name, "bits": m.bits, "snr_db": m.snr} for m in found])


def bytes_of(text: str, option: str = "--size") -> int:
    """Bytes of "6GB", "800 MB" or "5.5 GiB". Raises UsageError for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt])(i?)b?\s*", text, re.IGNORECASE)
    try:
        assert match is not None
        power = "kmgt".index(match[2].lower()) + 1
        return int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"{option} is {text!r}", fix="write a number and a unit, such as 6GB") from error
