class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line that names the value, the rule it breaks and the remedy, with file and line where
    there is one. Every entry point prints it without a traceback and exits with code 2.
    """


class Interrupted(KeyboardInterrupt):
    """A signal stopped the work in good order; the message is one line that says how to go on.

    Every stage prints it without a traceback and exits with 128 + `signal`.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
