"""Errors that every entry point answers in one line: bad input, and work stopped by a signal."""

# The extra of pyproject.toml that a package which is imported where it is needed comes with.
EXTRAS = {
    "cryptography": "sign",
    "deepspeed": "deepspeed",
    "dvc_ssh": "ssh",
    "fastapi": "serve",
    "lm_eval": "benchmark",
    "mlflow": "mlflow",
    "mlx_lm": "export",
    "onnx": "classify",
    "onnxruntime": "classify",
    "onnxruntime_genai": "export",
    "onnxscript": "classify",
    "optuna": "search",
    "psycopg": "search",
    "securesystemslib": "sign",
    "python_multipart": "serve",
    "sklearn": "classify",
    "sqlalchemy": "search",
    "sse_starlette": "serve",
    "starlette_context": "serve",
    "tenacity": "judge",
    "uvicorn": "serve",
    "wandb": "wandb",
}


class InputError(Exception):
    """What the user gave cannot be used.

    The message is one line (or one line per problem) that names the value, the rule it breaks and the remedy, with file
    and line where there is one. `code` names the kind of problem for programs and tests: lower case, words joined by
    hyphens, such as `unknown-key`. Every entry point prints the message without a traceback and exits with code 2.
    """

    def __init__(self, message: str, *, code: str = "input") -> None:
        super().__init__(message)
        self.code = code


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
        f"install it with: make setup EXTRAS={EXTRAS[module]}",
        code="missing-extra",
    )
