"""Lathe: stock goes in, a finished part comes out."""

__version__ = "0.1.0"
