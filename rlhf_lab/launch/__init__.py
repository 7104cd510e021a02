"""Processes: how one settles on its machine, how several start and who of them writes."""
