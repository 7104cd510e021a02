"""One stage from a plan to its figures: what is checked and loaded before, what is measured after.

`prepare` does all that can go wrong because of a user's model or data, and writes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .data import Data
from .ledger import ONLINE
from .runs import Run
from .sources import gold_metrics
from .stages.adapters import POLICY, SCORE_FILE
from .tokens import pair_rows, prompt_rows, prompt_text, sft_rows
from .widgets.progress import Progress, watched

HELD_OUT = 512
"""Held-out prompts that a policy is judged on before and after training."""


@dataclass
class Prepared:
    """Models by role, rows with token ids, prompts to judge on, and rows lost on the way; functions
    that the stage learns from."""

    models: dict[str, Any]
    train: list[dict]
    test: list[dict]
    prompts: list
    counts: dict[str, int]
    functions: list[Callable]


def prepare(plan, data: Data, quiet: bool = True, functions: Sequence[Callable] = ()) -> Prepared:
    """Tokens and weights of a stage. Raises ValueError with one line for what does not fit."""
    model, tokenizer, args = plan.model, plan.model.tokenizer, plan.config()
    answer = args.response_length if plan.stage in ONLINE else 64
    room = model.context - answer
    if room < 1:
        raise ValueError(f"response_length={answer} leaves no room for a prompt: {model.name} "
                         f"takes {model.context} tokens")  # fmt: skip
    held_out, _ = prompt_rows(tokenizer, (data.prompts.test or data.prompts.train)[:HELD_OUT], room)
    if plan.stage in ONLINE:
        train, counts = prompt_rows(tokenizer, watched(data.prompts.train, "tokens", quiet), room)
        test, length = [], room
    else:
        length = min(args.max_length or model.context, model.context)
        make = sft_rows if plan.stage == "sft" else pair_rows
        rows = data.sft if plan.stage == "sft" else data.preferences
        (train, counts), (test, _) = (
            make(tokenizer, watched(r, "tokens", quiet), length) for r in (rows.train, rows.test)
        )
    if not train:
        lost = ", ".join(f"{n} {why}" for why, n in counts.items() if n)
        raise ValueError(
            f"{data.name}: no row is left to train {plan.stage} on within {length} tokens "
            f"({lost}); {model.name} takes {model.context}, max_length may be up to that"
        )
    if plan.stage == "ppo" and not quiet and (why := _new_critic(plan)):
        print(f"ppo: the value model starts on the SFT model with a zero head: {why}", flush=True)
    prompts = [r["prompt"] for r in held_out]
    return Prepared(load_roles(plan), train, test, prompts, counts, list(functions))


def _new_critic(plan) -> str:
    """Why a value model of PPO's cannot start as a copy of the reward model; "" where it does, or
    where the layout has none (15)."""
    if plan.config().layout != "four":
        return ""
    if plan.settings.get("rule_reward"):
        return "there is no reward model"
    if plan.model.foreign_reward:
        return "the reward model has a vocabulary of its own, and reads texts"
    return ""


def load_roles(plan) -> dict[str, Any]:
    """The models of a stage, each a separate copy; with LoRA, adapters on the one that is trained.

    TRL's trainers on adapters need no reference: it is the same model with the adapters off.
    """
    model, stage = plan.model, plan.stage
    seed = int(plan.settings.get("seed", 42))
    if stage == "reward":
        return {"reward": _adapted(plan, model.new_reward(seed), "SEQ_CLS")}
    if plan.settings.get("load_in_4bit"):
        roles = {"policy": model.sft_in_4bit(bool(plan.settings.get("use_bnb_nested_quant")))}
    else:
        roles = {"policy": model.base if stage == "sft" else model.sft}
    if stage == "ppo":
        roles |= _judges(plan)
    if stage in ("rloo", "grpo"):
        if not plan.settings.get("rule_reward"):
            roles["reward"] = model.reward
        if plan.config().beta and not plan.lora:
            roles["reference"] = model.sft
    return roles | {"policy": _adapted(plan, roles["policy"], "CAUSAL_LM")}


def _judges(plan) -> dict[str, Any]:
    """What stands beside PPO's policy in the plan's layout (`stages/layouts.py`)."""
    model, layout = plan.model, plan.config().layout
    reward = None
    if not plan.settings.get("rule_reward"):
        reward = _judge_adapter(plan) or model.reward
    if layout == "adapters":
        return {"reference": None, "value": None, "reward": reward}
    value = None
    if layout == "four":
        value = model.new_value() if _new_critic(plan) else model.reward
    return {"reference": model.sft, "value": value, "reward": reward}


def _judge_adapter(plan) -> str | None:
    """The folder of the reward adapter, where the layout has a place for one."""
    return plan.model.paths.get("reward_adapter") if plan.config().layout == "adapters" else None


def _adapted(plan, model, task: str):
    """The model with LoRA adapters where the plan asks for them (`lora_r`)."""
    lora = plan.lora
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    # The score head is new: it is trained whole and saved with the adapters (rule 22).
    whole = {"modules_to_save": ["score"]} if task == "SEQ_CLS" else {}
    return get_peft_model(model, LoraConfig(task_type=task, **lora, **whole))


@dataclass
class Job:
    """One training in progress: what the stage functions below share."""

    plan: Any
    data: Data
    run: Run
    meter: Any
    ready: Prepared
    quiet: bool
    should_stop: Callable[[], bool] | None
    resume: bool = False
    """go on from the run's last checkpoint"""

    @property
    def tokenizer(self):
        return self.plan.model.tokenizer

    @property
    def args(self):
        return self.plan.config(str(self.run.folder / "trainer"))

    def progress(self, total: int):
        return None if self.quiet else Progress(total, self.plan.stage)

    def save(self, model) -> None:
        """A model in the transformers layout, its tokenizer beside it; adapters in `adapter/`."""
        if not self.run.writes:
            return
        adapted = hasattr(model, "peft_config")
        folder = self.run.folder / ("adapter" if adapted else "model")
        model.save_pretrained(folder, **({"selected_adapters": [POLICY]} if adapted else {}))
        self.tokenizer.save_pretrained(folder)

    def whole(self, model):
        """The trained model with its adapters merged in, saved; one without them as it is."""
        if not self.run.writes:
            return model
        if self.plan.settings.get("load_in_4bit"):  # merged into weights that were never rounded
            from peft import PeftModel

            model = PeftModel.from_pretrained(self.plan.model.sft, self.run.folder / "adapter")
        if hasattr(model, "peft_config"):
            model = model.merge_and_unload(adapter_names=[POLICY])
            self.save(model)
        return model


def _stoppable(work: Callable[[], Any], should_stop) -> tuple[float, bool]:
    """Run the training loop; → seconds, whether it was stopped early."""
    start = time.perf_counter()
    try:
        work()
    except KeyboardInterrupt:
        return time.perf_counter() - start, True
    return time.perf_counter() - start, bool(should_stop and should_stop())


def _costs(job: Job, seconds: float) -> dict[str, Any]:
    """What every stage reports of its cost (measured) and of the rows it could not use."""
    phase = "rollout" if job.plan.stage in ONLINE else "forward"
    tokens = sum(n for (p, _), n in job.meter.tokens.items() if p == phase)
    return {"seconds": seconds, "tokens_per_second": tokens / seconds,
            "peak_bytes": job.meter.peak, "rows": len(job.ready.train),
            "dropped": job.ready.counts}  # fmt: skip


def _trl_stage(job: Job, role: str, start: Callable) -> tuple[Any, dict[str, Any], bool]:
    """Run one of TRL's trainers on the model of a role; → trainer, costs, stopped."""
    from .stages.trl_stages import Watch

    watch = Watch(job.meter, role, job.run.log, job.progress, job.should_stop)
    ready = job.ready
    trainer = start(ready.models[role], job.tokenizer, ready.train, ready.test, job.args, watch)
    seconds, stopped = _stoppable(trainer.train, job.should_stop)
    watch.close()
    job.save(trainer.model)  # before anything else can fail or be interrupted
    return trainer, _costs(job, seconds), stopped


def _trl_policy(job: Job, start: Callable) -> tuple[Any, dict[str, Any], bool]:
    """Train the policy with TRL; → the trained model, costs and held-out loss, stopped."""
    trainer, figures, stopped = _trl_stage(job, "policy", start)
    if job.ready.test:
        figures["eval_loss"] = trainer.evaluate()["eval_loss"]
    return job.whole(trainer.model), figures, stopped


def _sft(job: Job):
    from .stages.trl_stages import sft_trainer

    before, _ = _policy_figures(job, job.ready.models["policy"], keep="base")
    model, figures, stopped = _trl_policy(job, sft_trainer)
    after, _ = _policy_figures(job, model, keep="sft")
    return figures | _before_after(before, after), stopped


def _reward(job: Job):
    from .stages.evaluate import noise_free_accuracy, pair_accuracy
    from .stages.trl_stages import reward_trainer, set_score_offset

    trainer, figures, stopped = _trl_stage(job, "reward", reward_trainer)
    model = job.whole(trainer.model)
    pairs = job.data.preferences.test
    if pairs:
        accuracy, margin = pair_accuracy(model, job.tokenizer, pairs)
        figures |= {"accuracy": accuracy, "held_out_pairs": len(pairs)}
        if job.data.has_gold:
            figures["accuracy_ceiling"] = job.data.accuracy_ceiling(pairs)
            gold = job.data.gold_reward
            figures["noise_free_accuracy"] = noise_free_accuracy(pairs, margin, gold)
    # Rule 16: demonstrations score 0 on average; kept in the config, where PPO finds it.
    demonstrations = (job.data.sft.train or job.data.preferences.train)[:256]
    figures["score_offset"] = set_score_offset(model, job.tokenizer, demonstrations)
    job.save(model)
    if job.plan.lora:  # what its config says of a whole model
        beside = job.run.folder / "adapter" / SCORE_FILE
        beside.write_text(json.dumps({"score_offset": figures["score_offset"]}) + "\n")
    return figures, stopped


def _dpo(job: Job):
    from .stages.trl_stages import dpo_trainer

    before, told = _policy_figures(job, job.ready.models["policy"], keep="sft")
    model, figures, stopped = _trl_policy(job, dpo_trainer)
    after, answers = _policy_figures(job, model, job.plan.model.sft, keep="dpo")
    figures |= _before_after(before, after)
    if "reward" in job.plan.model.paths:
        figures |= _wins(job, job.plan.model.reward, told, answers)
    return figures, stopped


def _ppo(job: Job):
    from .stages.ppo import PPOTrainer

    roles, judge = job.ready.models, _judge_adapter(job.plan)
    trainer = PPOTrainer(
        job.args, job.tokenizer, roles["policy"], roles["reference"], roles["reward"],
        job.ready.train, roles["value"], reward_funcs=job.ready.functions,
        reward_processing_class=None if judge else job.plan.model.reward_tokenizer,
        eval_dataset=[{"prompt": p} for p in job.ready.prompts],
        metric_funcs=gold_metrics(job.data), meter=job.meter, on_sample=job.run.sample,
        should_stop=job.should_stop,
    )  # fmt: skip
    policy, reference, reward = trainer.policy, trainer.reference, trainer.reward_model
    kept = any(row.get("when") == "sft" for row in job.run.samples)
    before, told = _policy_figures(job, policy, reward_model=reward, keep="" if kept else "sft")
    if job.resume:
        done = trainer.restore()
        job.run.rewind(done)
        if not job.quiet:
            print(f"ppo: going on after iteration {done} of {trainer.iterations}", flush=True)
    bar, earlier = job.progress(trainer.iterations - trainer.state.global_step), trainer.seconds

    def record(step: int, metrics: dict) -> None:
        job.run.log(step, **metrics)
        if bar and "kl" in metrics:  # not held-out figures
            shown = {"reward": "reward", "KL": "kl", "gold": "gold_reward"}
            bar.update(
                1, "  ".join(f"{n} {metrics[k]:.2f}" for n, k in shown.items() if k in metrics)
            )

    trainer.on_log = record
    seconds, stopped = _stoppable(trainer.train, job.should_stop)
    job.meter.close()
    if bar:
        bar.close()
    model = getattr(policy, "switched", lambda: policy)()
    job.save(model)
    after, answers = _policy_figures(job, policy, reference, reward, keep="ppo")
    figures = _costs(job, earlier + seconds) | _before_after(before, after)
    figures |= _wins(job, reward, told, answers)
    job.whole(model)  # last: whoever shares the base with it is lost
    return figures, stopped


def _online(job: Job):
    """RLOO and GRPO, with the figures of PPO."""
    from .stages.online import Judge, OnlineWatch, online_trainer

    roles, stage = job.ready.models, job.plan.stage
    reward = roles.get("reward")
    before, told = _policy_figures(job, roles["policy"], reward_model=reward, keep="sft")
    judge = Judge(reward, job.tokenizer, job.args, meter=job.meter, on_sample=job.run.sample,
                  metric_funcs=gold_metrics(job.data), reward_funcs=job.ready.functions,
                  reward_tokenizer=job.plan.model.reward_tokenizer)  # fmt: skip
    watch = OnlineWatch(job.meter, judge, job.run.log, job.progress, job.should_stop)
    trainer = online_trainer(roles["policy"], roles.get("reference"), job.tokenizer,
                             job.ready.train, job.args, judge, watch)  # fmt: skip
    seconds, stopped = _stoppable(trainer.train, job.should_stop)
    watch.close()
    job.save(trainer.model)
    reference = roles.get("reference") or job.plan.model.sft
    after, answers = _policy_figures(job, job.whole(trainer.model), reference, reward, keep=stage)
    figures = _costs(job, seconds) | _before_after(before, after)
    return figures | _wins(job, reward, told, answers), stopped


def _policy_figures(
    job: Job, model, reference=None, reward_model=None, keep=""
) -> tuple[dict[str, float], list[str]]:
    """What a policy is worth on held-out prompts, and what it said; `keep` records some of it."""
    from .stages.evaluate import policy_report

    prompts = job.ready.prompts
    if not prompts:
        return {}, []
    gold = job.data.has_gold
    with job.meter.phase("evaluation"):
        figures, responses = policy_report(
            model, job.tokenizer, prompts, reference=reference, reward_model=reward_model,
            gold_parts=job.data.gold_parts if gold else None,
            gold_reward=job.data.gold_reward if gold else None,
            reward_tokenizer=job.plan.model.reward_tokenizer if reward_model else None,
            max_new_tokens=int(job.plan.settings.get("response_length", 64)),
        )  # fmt: skip
    if keep:
        rows = zip(prompts[:32], responses, strict=False)
        job.run.sample(
            0, [{"prompt": prompt_text(p), "response": r, "when": keep} for p, r in rows]
        )
    return figures, responses


def _wins(job: Job, reward_model, before: list[str], after: list[str]) -> dict[str, float]:
    """How often the reward model prefers the response after training to the one before."""
    from .stages.evaluate import win_rate

    if not before or reward_model is None:
        return {}
    rate = win_rate(reward_model, job.plan.model.reward_tokenizer, job.ready.prompts, before, after)
    return {"win_rate": rate}


def _before_after(before: dict, after: dict) -> dict[str, float]:
    """Figures after training, and those from before as `before/<name>`."""
    return after | {f"before/{name}": value for name, value in before.items()}


STAGE_FUNCTIONS = {"sft": _sft, "reward": _reward, "ppo": _ppo, "dpo": _dpo,
                   "rloo": _online, "grpo": _online}  # fmt: skip
