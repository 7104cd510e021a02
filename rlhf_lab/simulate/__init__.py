"""The x-ray: the real trainers' step on tensors without data."""
