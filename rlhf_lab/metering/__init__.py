"""Measuring a live run: seconds, FLOPs, tokens, memory by phase and role."""
