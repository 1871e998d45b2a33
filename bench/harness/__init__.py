"""Clocks, meters, records and endings: what every benchmark needs, whatever its subject."""
