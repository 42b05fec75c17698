"""`refspan vectors`: write frozen cases for those who test without Python, or check a folder of them."""

from pathlib import Path

import click


@click.command("vectors")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--lint", is_flag=True, help="Write nothing; say what is wrong with the vectors in FOLDER.")
def command(folder: Path, *, lint: bool) -> int:
    """Write the frozen cases of the conformance suite into FOLDER, as ONNX backend tests and as safetensors.

    Exit status: 0, 1 if --lint found something, 2 if FOLDER cannot be read or written.
    """
    from refspan.conformance.vectors.folder import write_folder
    from refspan.conformance.vectors.frozen import frozen_vectors
    from refspan.conformance.vectors.lint import lint_folder

    if not lint:
        vectors = frozen_vectors()
        write_folder(folder, vectors)
        click.echo(f"{len(vectors)} vectors in {folder}")
        return 0
    faults = 0
    for fault in lint_folder(folder):
        click.echo(fault)
        faults += 1
    click.echo(f"{faults} faults in {folder}")
    return int(faults > 0)
