"""A run on disk, made of the metrics that a test wants to draw."""

import pytest

from rlhf_lab.runs.run import Run


@pytest.fixture
def made(tmp_path):
    """Make a run: `made("a", metrics, seed=1, stage="ppo", summary=…, **settings)`."""

    def make(name, metrics, stage="ppo", model="tiny", seed=0, summary=None, **settings):
        run = Run.create(
            tmp_path / name,
            stage=stage,
            model=model,
            data="stories",
            seed=seed,
            settings={"seed": seed, **settings},
        )
        for step, line in metrics.items():
            run.log(step, **line)
        run.finish(**(summary or {}))
        return run

    return make
