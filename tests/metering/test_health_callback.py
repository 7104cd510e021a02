"""`lab.HealthCallback` in plain TRL scripts: SFT, DPO and GRPO of a tiny random model.

pytest tests/metering/test_health_callback.py
"""

import copy
import subprocess
import sys
import warnings

import pytest
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import rlhf_lab as lab

STEPS = 6
CPU = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
CPU |= {"logging_steps": 1, "save_strategy": "no", "per_device_train_batch_size": 4}
WORDS = ["w1 w2", "w3", "w4 w5", "w6 w7"] * 8


def trainer_of(kind, tiny, folder, callback):
    args = {**CPU, "output_dir": str(folder), "max_steps": STEPS}
    given = {"processing_class": tiny.tokenizer(), "callbacks": [callback]}
    if kind == "sft":
        rows = Dataset.from_dict({"text": WORDS})
        return SFTTrainer(tiny.lm(0), SFTConfig(**args), train_dataset=rows, **given)
    if kind == "dpo":
        pairs = {"prompt": WORDS, "chosen": WORDS[::-1], "rejected": WORDS[1:] + WORDS[:1]}
        rows = Dataset.from_dict(pairs)
        made = {"ref_model": tiny.lm(0), "args": DPOConfig(**args), "train_dataset": rows}
        return DPOTrainer(tiny.lm(0), **made, **given)
    config = GRPOConfig(**args, num_generations=4, max_completion_length=6, beta=0.1)
    rows = Dataset.from_dict({"prompt": WORDS})

    def reward(completions, **_):
        return [float(len(c)) for c in completions]

    tiny.lm(0).save_pretrained(folder / "sft")  # GRPO loads its reference from there
    return GRPOTrainer(str(folder / "sft"), reward, config, train_dataset=rows, **given)


@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_it_reads_the_logs_of_a_plain_script_and_changes_nothing(kind, tiny, tmp_path):
    callback = lab.HealthCallback(on_critical="stop")
    with warnings.catch_warnings(record=True):
        trainer = trainer_of(kind, tiny, tmp_path, callback)
        trainer.train()
    assert len(callback.lines) == STEPS == trainer.state.global_step
    assert all("grad_norm" in line for line in callback.lines)
    assert "gradient_growth" in callback.health.known, callback.health
    if kind == "grpo":
        line = callback.lines[-1]
        assert line["kl_per_token"] == line["kl"] and "kl_high" in callback.health.known
        assert line["stopped"] == pytest.approx(1 - line["completions/clipped_ratio"])
        assert line["response_length"] == line["completions/mean_length"]


def logged(callback, values, **more):
    """What a trainer tells a callback, for each value of the KL. → whether it is to stop."""
    control, state = TrainerControl(), TrainerState()
    for step, kl in enumerate(values, 1):
        state.global_step = step
        callback.on_log(None, state, control, {"kl": kl, **more})
    return control.should_training_stop


def test_it_warns_once_and_stops_only_where_asked():
    for word, stops in {"warn": False, "stop": True}.items():
        callback = lab.HealthCallback(on_critical=word)
        with pytest.warns(UserWarning, match="step 2: critical: kl_high") as said:
            assert logged(callback, [0.0, 50.0, 60.0]) == stops
        assert len(said) == 1 and "kl_high" in str(callback.health)
    with pytest.warns(UserWarning, match="grad_norm=nan"):
        assert logged(lab.HealthCallback("stop"), [0.0], grad_norm=float("nan"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not logged(lab.HealthCallback("stop"), [0.0, 0.01], train_runtime=1.0)
        assert not logged(lab.HealthCallback("stop"), [0.0, 0.01, 0.02])


def test_another_word_is_refused_before_anything_slow_is_imported():
    code = "import sys, rlhf_lab as lab\ntry: lab.HealthCallback(on_critical='raise')\n"
    code += "except ValueError as e: print(e, {'torch', 'transformers'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "on_critical='raise': choose from warn, stop set()\n"


def test_one_is_transformers_own_and_can_be_copied():
    callback = lab.HealthCallback("stop")
    logged(callback, [0.0])
    copied = copy.deepcopy(callback)
    assert isinstance(copied, TrainerCallback) and isinstance(copied, lab.HealthCallback)
    assert copied.on_critical == "stop" and copied.lines == callback.lines


def test_a_long_run_costs_no_more_a_log_than_a_short_one():
    callback = lab.HealthCallback()
    logged(callback, [0.01] * 300)
    assert len(callback.lines) == 102 and callback.lines[0]["kl"] == 0.01
