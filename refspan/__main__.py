"""The command line. Each command lives in a module of `refspan.commands` that is imported when it is asked for."""

import importlib
import keyword
import os
import sys

import click
from click.exceptions import NoArgsIsHelpError

from refspan.errors import RunFailedError, SetupError

COMMANDS = {
    "check": "Hold a backend against the specification.",
    "export": "Write an ONNX graph: of one attention step, of its gradient, or of a whole model.",
    "generate": "Continue a text with an exported model.",
    "import": "Read a model that the original implementation trained.",
    "run": "Score a text or token file with an exported model.",
    "vectors": "Write frozen cases of the conformance suite, or check a folder of them.",
}
"""Command name -> what it does. The command itself is `refspan.commands.NAME:command`; `import` is in `import_`."""


class LazyGroup(click.Group):
    """Lists commands without importing them, so that `refspan --help` is instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import the command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command = importlib.import_module(f"refspan.commands.{module}").command
        assert isinstance(command, click.Command)  # noqa: S101
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list in `--help`, from the texts above."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="refspan", prog_name="refspan")
def cli() -> None:
    """Expire-Span as an executable specification, with ONNX graphs and a conformance suite."""


def main() -> None:
    """Run the command line; errors are one line on stderr and a non-zero status, never a traceback."""
    try:
        status = cli.main(prog_name="refspan", standalone_mode=False)
    except NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except click.ClickException as error:
        ctx = error.ctx if isinstance(error, click.UsageError) else None
        said = " ".join(error.format_message().split()).removesuffix(".")
        helps = f"; '{ctx.command_path} --help' says more" if ctx else ""
        click.echo(f"{ctx.command_path if ctx else 'refspan'}: {said}{helps}", err=True)
        status = error.exit_code
    except click.Abort:
        click.echo("refspan: interrupted", err=True)
        status = 130
    except SystemExit:  # what click makes of output that nobody reads any more
        status = 128 + 13  # SIGPIPE's number, which Windows has no name for
    except SetupError as error:
        click.echo(f"refspan: {error}", err=True)
        status = 2
    except RunFailedError as error:
        click.echo(f"refspan: {error}", err=True)
        status = 1
    except MemoryError:
        click.echo("refspan: there is no memory left", err=True)
        status = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"refspan: {where}{error.strerror or error}", err=True)
        status = 2
    except Exception as error:
        if os.environ.get("REFSPAN_TRACEBACK"):
            raise
        said = " ".join(str(error).split()) or "no message"
        click.echo(
            f"refspan: {type(error).__name__}: {said} (not foreseen, so a defect of refspan; "
            "REFSPAN_TRACEBACK=1 shows where)",
            err=True,
        )
        status = 2
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
