"""What RLHF costs. Measured here; predictions and simulations share the same ledger."""
