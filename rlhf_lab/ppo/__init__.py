"""PPO and what only PPO needs, to be read from `trainer.py` on."""
