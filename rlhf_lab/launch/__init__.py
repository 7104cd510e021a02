"""Processes: how one is prepared to train, how several are started, which of them writes."""
