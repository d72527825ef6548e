# The extra of pyproject.toml that a package which is imported where it is needed comes with.
EXTRAS = {
    "mlflow": "mlflow",
    "optuna": "search",
    "psycopg": "search",
    "sqlalchemy": "search",
    "sse_starlette": "serve",
    "starlette_context": "serve",
    "tenacity": "judge",
    "uvicorn": "serve",
    "wandb": "wandb",
}


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


def missing_extra(error: ModuleNotFoundError) -> InputError | None:
    """Return what to tell the user of an import that failed; None where the package belongs to no extra."""
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return None
    return InputError(
        f"the package {module} is not installed, which the extra {EXTRAS[module]} of pyproject.toml brings; "
        f"install it with: make setup EXTRAS={EXTRAS[module]}"
    )
