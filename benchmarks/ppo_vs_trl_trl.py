"""TRL's half of `ppo_vs_trl.py`: TRL 1.12.0's own PPOTrainer, in its own environment.

Not started by hand: `ppo_vs_trl.py` starts it and talks to it (`ppo_worker.py`). TRL's files are
not changed; one function that it calls is wrapped to read the lengths of the responses.
"""

from __future__ import annotations

import sys
from pathlib import Path

from ppo_parity_trl import (
    accelerate_version,
    make_trainer,
    ppo_trainer,
    transformers_version,
    trl_version,
)
from ppo_worker import Watch, serve

VERSIONS = {
    "trl": trl_version,
    "transformers": transformers_version,
    "accelerate": accelerate_version,
    "python": sys.version.split()[0],
}
truncate_response = ppo_trainer.truncate_response


def make(folder: Path, job: dict, watch: Watch):
    """TRL's trainer; its log, which has no response length, gets one."""
    lengths: list[int] = []

    def truncate(stop_token_id, pad_token_id, responses):
        cut = truncate_response(stop_token_id, pad_token_id, responses)
        lengths.extend((cut != pad_token_id).sum(1).tolist())
        return cut

    def mean_length() -> dict:
        mean = sum(lengths) / len(lengths)
        lengths.clear()
        return {"length": mean}

    ppo_trainer.truncate_response, watch.more = truncate, mean_length
    return make_trainer(folder, job, watch)


if __name__ == "__main__":
    serve(make, VERSIONS)
