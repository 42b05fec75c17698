"""The one exception that means: the question could not even be asked."""


class SetupError(Exception):
    """A package, device, file or option is missing or unusable.

    The message is one line that says what was wrong, what was expected and what to do. The command line prints it
    and exits with status 2.
    """


class RunFailedError(RuntimeError):
    """What was asked for was right, and failed while it ran: a device lost, memory at its end.

    The command line prints the message, one line, and exits with status 1.
    """
