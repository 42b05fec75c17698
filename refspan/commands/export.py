"""`refspan export`: write an ONNX graph of the attention step or of its gradient."""

from pathlib import Path

import click

from refspan.errors import SetupError
from refspan.files import write_whole


@click.command()
@click.argument("graph", type=click.Choice(["attention", "gradient"]))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--form",
    type=click.Choice(["fused", "portable"]),
    help="Of the attention graph: the Attention operator (fused, the default) or primitive operators (portable).",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "float16"]),
    default="float32",
    show_default=True,
    help="Of query, key, value and position; spans are float32 in any case.",
)
@click.option(
    "--opset", type=int, metavar="N", help="Version of the ONNX operator set; by default 24 if fused, otherwise 18."
)
@click.option(
    "--position/--no-position", default=False, show_default=True, help="With an input for relative positions."
)
def command(graph: str, out: Path, form: str | None, dtype: str, opset: int | None, position: bool) -> None:
    """Write an ONNX graph of one attention step, or of its vector-Jacobian product, to the file OUT.

    Batch, heads, queries, memories, head size and positions may have any size. Inputs and outputs are described in the
    file itself.
    """
    from refspan.export import attention_model, gradient_model

    if graph == "gradient":
        if form == "fused":
            raise SetupError("--form fused: the gradient has no fused form; leave the option out")
        model = gradient_model(dtype, position=position, opset=opset)
    else:
        model = attention_model(form or "fused", dtype, position=position, opset=opset)
    content = model.SerializeToString()
    write_whole(out, content)

    label = {entry.key: entry.value for entry in model.metadata_props}
    what = f"{graph}, {label['form']}" if "form" in label else graph
    with_position = "with" if position else "without"
    click.echo(f"{out}: {what}, {dtype}, opset {label['opset']}, {with_position} positions, {len(content):,} bytes")
    inputs, outputs = (", ".join(value.name for value in values) for values in (model.graph.input, model.graph.output))
    click.echo(f"{inputs} -> {outputs}")
