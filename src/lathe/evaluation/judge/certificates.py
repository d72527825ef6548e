"""Certificates that the judge's connections trust: those of `judge.ca_bundle` in place of the usual ones."""

import ssl
from pathlib import Path

from lathe.common.errors import InputError


def load_certificates(ca_bundle: Path | None) -> ssl.SSLContext | None:
    """Return the certificates to trust instead of the usual authorities; raises InputError for a file without any."""
    if ca_bundle is None:
        return None
    try:
        return ssl.create_default_context(cafile=ca_bundle)
    except OSError as error:  # ssl.SSLError is one
        reason = error.strerror or "it holds no certificate"
        raise InputError(
            f"judge.ca_bundle is {ca_bundle}: {reason}; name a file with PEM certificates", code="invalid-ca-bundle"
        ) from None
