"""The one exception that means: the question could not even be asked."""


class SetupError(Exception):
    """A package, device, file or option is missing or unusable.

    The message is one line that says what was wrong, what was expected and what to do. The command line prints it
    and exits with status 2.
    """
