"""What a stage needs before it starts: tokens, weights, and the models of its roles.

`prepare` does all that can go wrong because of a user's model or data, and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from ..data.chat import chat_format, is_conversation, remedy
from ..data.load import Data
from ..data.rows_left import nothing_left, room_for_prompt
from ..data.schema import Example
from ..data.tokenize import Encoded, encoded_rows, prompt_rows
from ..display import counted
from ..launch.processes import once
from ..models.tokenizer import give_pad_token, same_vocabulary
from ..models.weights import embeddings, grow_embeddings
from ..ppo.config import KL_ESTIMATORS
from ..runs.progress import with_progress
from ..stages import STAGES, Settings, resolve
from .diverged import broken_weight

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from ..models.load import Model
    from ..planning import Plan, TrainerArgs
    from ..ppo.logprobs import AnyModel

Models: TypeAlias = "dict[str, AnyModel]"
"""By role; PPO's reward may be the folder of an adapter, and None is a role that another plays."""
Rows: TypeAlias = tuple[list[Example], list[Example], list[Example], dict[str, int]]
"""To train on, held out, with a prompt to evaluate on; counts of those that were dropped."""
Tokenize: TypeAlias = Callable[..., Encoded]
"""`tokenize(tokenizer, rows, most tokens)` -> rows with ids, and counts of what was dropped."""

HELD_OUT = 512
"""Held-out prompts that a policy is evaluated on before and after training."""
HELD_OUT_OF_LARGE = 64
"""The same of a model of more than `LARGE` parameters on a CPU, where sampling takes minutes."""
LARGE = 20e6


@dataclass
class Prepared:
    """Models by role, rows with token ids, rows with a prompt to evaluate on, and counts of dropped
    rows."""

    models: Models
    train: list[Example]
    test: list[Example]
    prompts: list[Example]
    counts: dict[str, int]


def prepare(plan: Plan, data: Data, args: TrainerArgs, quiet: bool = True) -> Prepared:
    """Tokens and weights of a stage, whose trainer takes `args`.

    Raises ValueError, one line, for what does not fit. Of several processes the first makes the
    rows, for all.
    """
    model, tokenizer, spec = plan.model, plan.model.tokenizer, STAGES[plan.stage]
    if (end := chat_format(tokenizer).end) == tokenizer.pad_token_id:
        give_pad_token(tokenizer, end)  # scores are read at the last token that is no padding
    train, test, held_out, counts = once(lambda: _rows(plan, data, args, quiet))
    if plan.stage == "ppo" and not quiet:
        if why := _new_critic(plan, args.layout):
            print(f"ppo: the value model starts on the SFT model with a zero head: {why}")
        if args.kl_estimator != "k1":
            print(f"ppo: kl_estimator={args.kl_estimator}: {KL_ESTIMATORS}", flush=True)
    models = load_roles(plan, args)
    if args.use_cpu and sum(p.numel() for p in models[spec.roles[0]].parameters()) > LARGE:
        held_out = held_out[:HELD_OUT_OF_LARGE]
    for role, loaded in models.items():
        if name := broken_weight(loaded):
            raise ValueError(
                f"the {role} model of {model.name} is broken: {name} holds NaN or infinity, and "
                "nothing can be learned from that; load another copy of it"
            )
    return Prepared(models, train, test, held_out, counts)


def _rows(plan: Plan, data: Data, args: TrainerArgs, quiet: bool) -> Rows:
    """Rows of token ids. Raises ValueError where none is left to train on."""
    model, tokenizer, spec = plan.model, plan.model.tokenizer, STAGES[plan.stage]
    make: Tokenize = resolve(spec.tokenize)
    rows = getattr(data, spec.rows)
    room = room_for_prompt(model, plan.settings)
    held_out, _ = prompt_rows(tokenizer, (data.prompts.test or data.prompts.train)[:HELD_OUT], room)
    test: list[Example] = []
    if spec.online:
        train, counts = make(tokenizer, with_progress(rows.train, "tokens", quiet), room)
        length = room
    else:
        length = min(args.max_length or model.context, model.context)
        (train, counts), (test, _) = (
            make(tokenizer, with_progress(r, "tokens", quiet), length)
            for r in (rows.train, rows.test)
        )
    if plan.stage == "kto" and len(test) == 1:
        test = []  # it meets no answer to another prompt
    if model.foreign_reward and spec.online:  # which has a template of its own
        theirs = model.reward_tokenizer
        train = [row for row, *_ in encoded_rows(theirs, train, (), counts)]
        held_out = [row for row, *_ in encoded_rows(theirs, held_out, (), {})]
    if not quiet:
        say_of_template(plan.stage, tokenizer, rows.train, counts)
    if not train:
        raise nothing_left(plan.stage, model, data, length, counts)
    if spec.online and spec.trainer:  # TRL leaves out what does not fill a generation
        of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        batch = getattr(args, "generation_batch_size", None) or of_step * args.world_size
        wanted = batch // getattr(args, "num_generations", 1)
        if len(train) < wanted:
            raise ValueError(
                f"{data.name}: {counted(len(train), 'prompt')} cannot fill a generation of "
                f"{wanted}, and nothing would be trained: give more, or a smaller "
                "per_device_train_batch_size"
            )
    return train, test, held_out, counts


def say_of_template(
    stage: str, tokenizer: Tokenizer, rows: list[Example], dropped: Mapping[str, int]
) -> None:
    """Tell what the model's chat template cannot write, with the remedy, and whether it writes
    today's date (Llama 3.2, gpt-oss)."""
    lines = [
        f"left out {counted(n, 'row')}: {why}; {remedy(why)}"
        for why, n in dropped.items()
        if remedy(why)
    ]
    dated = "strftime_now" in str(tokenizer.chat_template)
    if dated and any(is_conversation(row["prompt"]) for row in rows[:100]):
        lines.append("the chat template writes today's date: tomorrow the same rows are others")
    for line in lines:
        print(f"{stage}: {line}", flush=True)


def _new_critic(plan: Plan, layout: str) -> str:
    """Why a value model of PPO's cannot start as a copy of the reward model; "" where it does, or
    layout has none (rule 15)."""
    if layout != "four":
        return ""
    if plan.settings.get("rule_reward"):
        return "there is no reward model"
    if plan.model.foreign_reward:
        return "the reward model has a vocabulary of its own, and reads texts"
    return ""


def load_roles(plan: Plan, args: TrainerArgs) -> Models:
    """The models of a stage, each a separate copy; with LoRA, adapters on the one that is trained.

    TRL's trainers on adapters need no reference: it is the same model with the adapters off.
    """
    model, spec = plan.model, STAGES[plan.stage]
    seed = int(plan.settings.get("seed", 42))
    nested = bool(plan.settings.get("use_bnb_nested_quant"))
    four_bits = nested if plan.settings.get("load_in_4bit") else None
    if spec.roles[0] == "reward":
        return {"reward": _adapted(plan, model.new_reward(seed, four_bits), "SEQ_CLS")}
    trained = spec.roles[0]
    if four_bits is not None:
        roles = {trained: model.in_4bit(spec.starts_from, four_bits)}
    else:
        roles = {trained: getattr(model, spec.starts_from)}
    if trained == "student":
        roles["teacher"] = teacher_of(model, embeddings(roles[trained]))
    elif "value" in spec.roles:
        roles |= _critics(plan, args.layout)
    elif spec.online:
        if not plan.settings.get("rule_reward"):
            roles["reward"] = model.reward
        if args.beta and not plan.lora:
            roles["reference"] = model.sft
    rows = embeddings(roles[trained])
    for role, played in roles.items():  # a policy may sample any token that it has an embedding for
        foreign = role == "reward" and model.foreign_reward
        if hasattr(played, "resize_token_embeddings") and not foreign:
            grow_embeddings(played, rows)
    return roles | {trained: _adapted(plan, roles[trained], "CAUSAL_LM")}


def teacher_of(student: Model, rows: int) -> AnyModel:
    """The model that a student of so many embeddings learns from. Both must read the same tokens;
    embeddings that no token has are cut off the teacher. Raises ValueError, one line."""
    teacher = student.teacher
    if not same_vocabulary(teacher.tokenizer, student.tokenizer):
        raise ValueError(
            f"{teacher.name} cannot teach {student.name}: its tokens are others, and distributions "
            "over them cannot be compared; choose a teacher with the student's tokenizer, or train "
            "SFT on texts that the teacher wrote"
        )
    model = teacher.sft.requires_grad_(False)
    if embeddings(model) > rows:
        model.resize_token_embeddings(rows)
    return model


def _critics(plan: Plan, layout: str) -> Models:
    """The models beside PPO's policy in a layout (`ppo/layouts.py`)."""
    model = plan.model
    reward = None
    if not plan.settings.get("rule_reward"):
        reward = reward_adapter(plan, layout) or model.reward
    if layout == "adapters":
        return {"reference": None, "value": None, "reward": reward}
    value = None
    if layout == "four":
        value = model.new_value() if _new_critic(plan, layout) else model.reward
    return {"reference": model.sft, "value": value, "reward": reward}


def reward_adapter(plan: Plan, layout: str) -> str | None:
    """The folder of the reward adapter, where the layout has a place for one."""
    return plan.model.paths.get("reward_adapter") if layout == "adapters" else None


def _adapted(plan: Plan, model: AnyModel, task: str) -> AnyModel:
    """The model with LoRA adapters where the plan asks for them (`lora_r`)."""
    lora = plan.lora
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    # The score head is new: it is trained whole and saved with the adapters (rule 22).
    whole: Settings = {"modules_to_save": ["score"]} if task == "SEQ_CLS" else {}
    return get_peft_model(model, LoraConfig(task_type=task, **lora, **whole))
