"""What the tests of RLOO and GRPO share: a trainer on tiny random models that tells what it did."""

import torch
from ppo_kit import PROMPTS

from rlhf_lab.data.tokenize import encode_prompt
from rlhf_lab.metering.meter import Meter
from rlhf_lab.ppo.rollout import concat_prompt_response, response_logprobs
from rlhf_lab.ppo.sampling import pad_prompts
from rlhf_lab.trainers.online import (
    GRPOConfig,
    RewardFunction,
    RLOOConfig,
    SamplingWatch,
    online_trainer,
)
from rlhf_lab.trainers.trl import trl_settings


class Online:
    """A trainer on tiny random models, what it logged, and what its reward_function was asked."""

    def __init__(
        self,
        stage,
        tiny,
        folder,
        kind="llama",
        lora=False,
        prompts=PROMPTS,
        sizes=(),
        template=None,
        **settings,
    ):
        sizes = dict(sizes)
        settings = {
            "per_device_train_batch_size": 4,
            "steps_per_generation": 2,
            "num_iterations": 2,
            "num_generations": 2,
            "max_steps": 8,
            "logging_steps": 4,
            "response_length": 6,
            "learning_rate": 1e-2,
            "beta": 0.1,
            "save_strategy": "no",
            **settings,
        }
        made = RLOOConfig if stage == "rloo" else GRPOConfig
        self.args = made(**trl_settings(settings, str(folder)))
        self.meter, self.logged, self.asked = Meter(stage), [], []
        self.tokenizer, self.reference = tiny.tokenizer(), tiny.lm(0, kind, **sizes)
        self.tokenizer.chat_template = template
        self.policy = tiny.lm(0, kind, **sizes)
        if lora:
            from peft import LoraConfig, get_peft_model

            self.policy = get_peft_model(self.policy, LoraConfig(r=2, target_modules="all-linear"))
        self.reward = tiny.rm(1, kind, **sizes)
        self.reward_function = RewardFunction(
            self.reward,
            self.tokenizer,
            self.args,
            meter=self.meter,
            metric_funcs={"asked": self.ask},
        )
        log = lambda step, **m: self.logged.append(m)  # noqa: E731
        watch = SamplingWatch(self.meter, self.reward_function, log)
        self.trainer = online_trainer(
            stage,
            self.policy,
            self.reference if self.args.beta and not lora else None,
            self.tokenizer,
            [{"prompt": p} for p in prompts],
            self.args,
            self.reward_function,
            watch,
        )

    @torch.no_grad()
    def ask(self, prompts, completions, completion_ids, **_):
        """Called when sampled and not yet trained on: KL of the policy that sampled, our way."""
        kl = 0.0
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            start, pad = encode_prompt(self.tokenizer, prompt), self.tokenizer.pad_token_id
            answer = torch.tensor([ids])
            whole = concat_prompt_response(*pad_prompts([start], pad), answer, answer >= 0, pad)
            logprobs = [
                response_logprobs(m, *whole, answer, self.args.temperature)
                for m in (self.trainer.model, self.reference)
            ]
            kl += float((logprobs[0] - logprobs[1]).sum()) / len(prompts)
        self.asked.append({"prompts": prompts, "ids": completion_ids, "kl": kl})
        return [0.0] * len(prompts)
