class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line that names the value, the rule it breaks and the remedy, with file and line where
    there is one. Every entry point prints it without a traceback and exits with code 2.
    """
