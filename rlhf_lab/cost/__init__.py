"""What RLHF will cost, in pure arithmetic: no torch, no transformers."""
