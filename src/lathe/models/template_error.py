"""Errors of chat templates."""

from lathe.common.errors import InputError


class TemplateError(InputError):
    """A conversation that the chat template cannot render as a prompt and an answer."""
