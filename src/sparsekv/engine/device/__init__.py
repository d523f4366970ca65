"""Runs what was decided: the only part of the engine that touches the device."""
