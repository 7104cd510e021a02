"""What RLHF does: SFT, reward model and DPO over TRL's trainers, and our own PPO."""
