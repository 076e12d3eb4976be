"""REPORT: octets to values and back.  No socket, clock, randomness, configuration or log."""
