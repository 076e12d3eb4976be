"""DELIVER: an Envelope of admitted recipients and its content, to one Reply."""
