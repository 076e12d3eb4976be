"""Gatepost: an SMTP gateway that makes any mail server safe to put on the Internet."""

__version__ = "0.1.0"
