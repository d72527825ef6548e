"""Licences of what is published: which of them say something that whoever publishes must know."""

import pytest

from lathe.publishing.licences import SourceLicence


@pytest.mark.parametrize(
    "licence", ["apache-2.0", "mit", "cc-by-4.0", "cc-by-sa-4.0", "bsd-3-clause", "openrail", "ncsa", "ecl-2.0"]
)
def test_a_free_licence_says_nothing(licence):
    assert SourceLicence("base x", licence).describe() == f"base x: {licence}"


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("cc-by-nc-4.0", "NON-COMMERCIAL"),
        ("cc-by-nc-sa-3.0", "NON-COMMERCIAL"),
        ("fair-noncommercial-research-license", "NON-COMMERCIAL"),
        ("apple-amlr", "NON-COMMERCIAL"),
        ("qwen-research-license", "NON-COMMERCIAL"),
        ("cc-by-nc-nd-4.0", "NO DERIVATIVES"),
        ("cc-by-nd-4.0", "NO DERIVATIVES"),
        ("llama3.2", "terms of its own"),
        ("gemma", "terms of its own"),
        ("other", "terms of its own: read them at https://example.org"),
        ("not known", "no licence is known"),
    ],
)
def test_a_licence_that_restricts_or_is_unknown_is_said(licence, said):
    assert said in SourceLicence("base x", licence, "https://example.org").describe()
