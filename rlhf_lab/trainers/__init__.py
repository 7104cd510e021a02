"""SFT, reward model, DPO, RLOO and GRPO, thin over TRL; what surrounds a stage's training."""
