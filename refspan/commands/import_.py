"""`refspan import`: a checkpoint of the original implementation becomes a model file of ours."""

import importlib
import json
import re
import shlex
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from refspan.errors import SetupError


@click.command()
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--settings",
    type=click.Path(path_type=Path),
    help="The flags that the model was trained with, as text or JSON; by default args.txt beside the checkpoint.",
)
def command(checkpoint: Path, out: Path, settings: Path | None) -> None:
    """Read a checkpoint that transformer-sequential saved, and write the model to the file OUT (.safetensors).

    It must be an Expire-Span or a Transformer-XL model. Code that a checkpoint may hold is not run. Needs PyTorch.
    """
    from refspan.checkpoint import save_model
    from refspan.files import check_distinct, check_file, check_writable
    from refspan.interop import from_transformer_sequential

    check_distinct({"OUT": out}, {"CHECKPOINT": checkpoint, "--settings": settings})
    check_writable(out)
    check_file(checkpoint)
    given = read_settings(settings or checkpoint.parent / "args.txt")
    saved = load_checkpoint(checkpoint)
    try:
        config, params = from_transformer_sequential(state_of(saved), given)
    except (TypeError, ValueError) as error:
        raise SetupError(f"{checkpoint}: {error}") from None
    notes = {"imported_from": checkpoint.name}
    epoch = saved.get("epoch")
    if isinstance(epoch, int):
        notes["epoch"] = str(epoch)
    save_model(out, config, params, notes=notes)

    after = f" after epoch {epoch}" if "epoch" in notes else ""
    dtype = params["embedding.weight"].dtype
    click.echo(f"{out}: {sum(array.size for array in params.values()):,} parameters, {dtype}, of {checkpoint}{after}")
    click.echo(", ".join(f"{name} {value}" for name, value in config.to_dict().items()))


def read_settings(path: Path) -> dict[str, Any]:
    """Settings by name out of a file of command-line flags, on any number of lines, or of one JSON object.

    A flag without a value is True. What stands before the first flag is passed over: it may be a whole command.

    Raises:
        SetupError: the file cannot be read, or holds no settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith(("{", "[")):
            given = json.loads(text)
            words = []
        else:
            given = {}
            words = shlex.split(text.replace("\\\n", " "), comments=True)
    except FileNotFoundError:
        raise SetupError(
            f"{path}: no such file; --settings FILE names the flags that the model was trained with"
        ) from None
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # no UTF-8, no JSON, an open quote
        raise SetupError(f"{path}: {error}") from None
    name = None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            given[name] = value if equals else True
        elif name is not None and given[name] is True:  # of several values the first will do: none is about the model
            given[name] = word
    if not isinstance(given, dict) or not given:
        raise SetupError(f"{path}: no settings in it, expected flags such as --hid-sz 512, or a JSON object")
    return given


def load_checkpoint(path: Path) -> Mapping[str, Any]:
    """The dict that a checkpoint is; raises SetupError unless it is one of tensors and plain values only."""
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        said = " ".join(str(error).split())
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"cannot be loaded ({said})"
        raise SetupError(f"PyTorch {reason}, and only it reads its checkpoints; pip install torch") from None
    try:
        file = path.open("rb")
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror or error}") from None
    try:
        with file, warnings.catch_warnings(action="ignore"):  # they advise its programmers
            saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - it raises whatever the bytes lead it to
        code = re.search(r"\bGLOBAL (\S+)", str(error))
        why = f"it would run code ({code[1]})" if code else "no PyTorch checkpoint, or not a whole one"
        raise SetupError(f"{path}: {why}; expected one of tensors and plain values") from None
    if not isinstance(saved, Mapping) or not isinstance(saved.get("model"), Mapping):
        raise SetupError(f"{path}: not a checkpoint of transformer-sequential, expected a dict with 'model' in it")
    return saved


def state_of(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays of a checkpoint's model; NumPy has no bfloat16, which becomes float32."""
    torch = importlib.import_module("torch")
    return {
        str(name): (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().numpy()
        for name, tensor in saved["model"].items()
        if isinstance(tensor, torch.Tensor)
    }
