#!/usr/bin/env bash
# A resumed Optuna study with a seed tries the settings again that it has tried, and ignores a new direction.
#
# Version: optuna 5.0.0; Python 3.11.
# Expected: create_study(load_if_exists=True) goes on where the stored study was: new trials are new settings. A
#   direction other than the stored one is an error.
# Behaviour: TPESampler(seed=0), as in every tutorial, begins its random numbers anew. Up to n_startup_trials (10) the
#   settings do not depend on what was tried: five trials, a second start of the script, and trials 6 to 10 are trials
#   1 to 5 once more; so does each of two processes that share a study. direction="maximize" on a study stored as
#   "minimize" is dropped: best_params are the worst run's. Neither is said at the default level but for "Using an
#   existing study".
# Remedy: no seed, or one that counts len(study.trials) in; pickle the sampler with the study; a name for each
#   direction.
# Seen: "10 trials in two starts: 5 settings; without a seed: 10; asked to maximize .1 to .9, the best is 0.1"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet optuna==5.0.0
cat > "$folder/try.py" <<'P'
import optuna

STORE = "sqlite:///trials.db"


def settings(name, **sampler):
    """The settings that ten trials in two starts of a script have tried."""
    tried = []
    for _ in range(2):
        study = optuna.create_study(study_name=name, storage=STORE, load_if_exists=True,
                                    sampler=optuna.samplers.TPESampler(**sampler))
        study.optimize(lambda trial: tried.append(trial.suggest_float("beta", 1e-3, 1, log=True)) or 0.0, n_trials=5)
    return len(tried), len(set(tried))


trials, seeded = settings("seeded", seed=0)
_, free = settings("free")
optuna.create_study(study_name="reward", storage=STORE, direction="minimize")
study = optuna.create_study(study_name="reward", storage=STORE, direction="maximize", load_if_exists=True)
rewards = iter([0.1, 0.9, 0.5])
study.optimize(lambda trial: next(rewards), n_trials=3)
print(f"{trials} trials in two starts: {seeded} settings; without a seed: {free}; asked to maximize .1 to .9, the best "
      f"is {study.best_value}")
assert (trials, seeded, free) == (10, 5, 10) and study.best_value == 0.1
P
cd "$folder" && env/bin/python try.py 2>/dev/null
