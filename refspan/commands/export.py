"""`refspan export`: write an ONNX graph of the attention step, of its gradient, or of a whole model."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from refspan.errors import SetupError
from refspan.files import check_distinct, check_writable, write_whole

if TYPE_CHECKING:
    import onnx

_FORM = click.Choice(["fused", "portable"])
_DTYPE = click.Choice(["float32", "float16"])

out_file = click.argument("out", type=click.Path(path_type=Path))


@click.group()
def command() -> None:
    """Write an ONNX graph of one attention step, of its gradient, or of a whole model.

    Inputs and outputs are described in the file itself.
    """


def options_of_a_step(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that both graphs of one step take."""
    for option in (
        click.option("--position/--no-position", default=False, show_default=True, help="An input for positions."),
        click.option("--opset", type=int, metavar="N", help="Version of the ONNX operator set."),
        click.option(
            *("--dtype", "dtype"),
            type=_DTYPE,
            default="float32",
            show_default=True,
            help="Of query, key, value and position; spans are float32 in any case.",
        ),
    ):
        function = option(function)
    return function


@command.command()
@out_file
@click.option(
    "--form",
    type=_FORM,
    default="fused",
    show_default=True,
    help="The Attention operator of opset 23 and later (fused), or primitive operators (portable).",
)
@options_of_a_step
def attention(out: Path, form: str, dtype: str, opset: int | None, position: bool) -> None:
    """Write one attention step to the file OUT.

    Batch, heads, queries, memories, head size and positions may have any size.
    """
    from refspan.export import attention_model

    _write_step(out, f"attention, {form}", attention_model(form, dtype, position=position, opset=opset))


@command.command()
@out_file
@click.option("--form", type=_FORM, hidden=True)
@options_of_a_step
def gradient(out: Path, form: str | None, dtype: str, opset: int | None, position: bool) -> None:
    """Write the vector-Jacobian product of one attention step to the file OUT."""
    from refspan.export import gradient_model

    if form == "fused":
        raise SetupError("--form fused: the gradient has no fused form; leave the option out")
    _write_step(out, "gradient", gradient_model(dtype, position=position, opset=opset))


@command.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@out_file
@click.option(
    "--form",
    type=_FORM,
    default="fused",
    show_default=True,
    help="The Attention operator for distant memories (fused), or primitive operators (portable), faster on CPUs.",
)
@click.option(
    "--dtype", type=_DTYPE, default="float32", show_default=True, help="Of parameters; spans are float32 in any case."
)
@click.option("--opset", type=int, metavar="N", help="Version of the ONNX operator set.")
@click.option(
    "--tokenizer",
    type=click.Choice(["bytes", "none"]),
    help="What a token is: one byte of the text, or a number of its own. By default what the checkpoint says.",
)
def model(checkpoint: Path, out: Path, form: str, dtype: str, opset: int | None, tokenizer: str | None) -> None:
    """Write a model with all its parameters to the file OUT: one step of a stream, blocks of any length.

    CHECKPOINT is a .safetensors file that `refspan import` or `refspan.save_model` wrote. Run the result with
    `refspan run`, `refspan generate` or `refspan.export.OnnxModel`. Parameters of more than 2 GB go to OUT.data.
    """
    from refspan.checkpoint import load_model, load_notes
    from refspan.export import streaming_model, write_model_file

    beside = out.with_name(f"{out.name}.data")
    check_distinct({"OUT": out, "the weights beside it,": beside}, {"CHECKPOINT": checkpoint})
    check_writable(out)
    config, params = load_model(checkpoint)
    kind = load_notes(checkpoint).get("tokenizer", "") if tokenizer is None else tokenizer.replace("none", "")
    if kind == "bytes" and config.vocab_size < 256:
        raise SetupError(f"--tokenizer bytes: the model knows {config.vocab_size} tokens, expected at least 256")
    try:
        made = streaming_model(config, params, form=form, dtype=dtype, opset=opset, tokenizer=kind)
    except ValueError as error:
        raise SetupError(f"{checkpoint}: {error}") from None
    files = write_model_file(out, made)

    size = sum(path.stat().st_size for path in files)
    numbers = sum(array.size for array in params.values())
    names = ", ".join(map(str, reversed(files)))
    click.echo(f"{names}: {numbers:,} parameters, {form}, {dtype}, opset {_labels(made)['opset']}, {size:,} bytes")
    about = [f"{name} {value}" for name, value in config.to_dict().items()]
    click.echo(", ".join([*about, f"positions {_labels(made)['positions']}", f"tokenizer {kind or 'none'}"]))


def _write_step(out: Path, what: str, made: "onnx.ModelProto") -> None:
    """Write a graph of one step and say what it is."""
    content, label = made.SerializeToString(), _labels(made)
    write_whole(out, content)
    positions = "with" if label["position"] == "true" else "without"
    click.echo(
        f"{out}: {what}, {label['dtype']}, opset {label['opset']}, {positions} positions, {len(content):,} bytes"
    )
    inputs, outputs = (", ".join(value.name for value in values) for values in (made.graph.input, made.graph.output))
    click.echo(f"{inputs} -> {outputs}")


def _labels(made: "onnx.ModelProto") -> dict[str, str]:
    return {entry.key: entry.value for entry in made.metadata_props}
