"""Fields of a submitted form, read within limits."""

from fastapi import Request

MOST_FIELDS = 2000
LONGEST_FIELD_BYTES = 1_000_000

FormTexts = dict[str, str]


async def read_form(request: Request) -> FormTexts:
    """Return the fields by their names; the last of several with one name counts, and no file is taken."""
    async with request.form(max_files=0, max_fields=MOST_FIELDS, max_part_size=LONGEST_FIELD_BYTES) as form:
        return {key: value for key, value in form.items() if isinstance(value, str)}
