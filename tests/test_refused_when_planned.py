"""What libraries refuse when training begins, or take without a word, is refused by the plan.

pytest tests/test_refused_when_planned.py
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap

import pytest
import torch
import trl
from transformers.trainer_pt_utils import AcceleratorConfig

import rlhf_lab as lab
from rlhf_lab.cli.config_files import as_flags
from rlhf_lab.models.structure import WITH_MORE
from rlhf_lab.settings import KEYS, NEEDS, WORDS, check_settings
from rlhf_lab.stages import STAGES, TRAINABLE, resolve
from rlhf_lab.training import check_first

THEIRS = [  # stage, settings that its config (TRL's, transformers') raises for
    ("grpo", {"num_generations": 1}),
    ("rloo", {"num_generations": 1}),
    ("grpo", {"generation_batch_size": 64, "steps_per_generation": 2}),
    ("grpo", {"generation_batch_size": 96, "num_generations": 5}),
    ("rloo", {"generation_batch_size": 50}),
    ("dpo", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}),
    ("sft", {"debug": "undrflow"}),
    ("sft", {"ddp_backend": "gloo"}),  # of one process
    ("sft", {"dataloader_prefetch_factor": 2}),
    ("sft", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
    ("sft", {"bf16_full_eval": True, "fp16_full_eval": True}),
    ("sft", {"save_steps": 1.5}),
    ("distill", {"beta": 3.0}),
    ("ppo", {"num_mini_batches": 7}),
    ("ppo", {"data_seed": 1}),
    ("ppo", {"layout": "fuor"}),
]


@pytest.mark.parametrize(("stage", "settings"), THEIRS)
def test_what_a_trainers_config_refuses_is_refused_by_the_plan(stage, settings, tmp_path):
    batch = {"per_device_train_batch_size": 32} if STAGES[stage].online else {}
    with pytest.raises(ValueError):
        resolve(STAGES[stage].config)(output_dir=str(tmp_path), **batch, **settings)
    with pytest.raises(ValueError) as refused:
        lab.plan(stage, "tiny", **settings)
    assert "\n" not in str(refused.value) and next(iter(settings)) in str(refused.value)


def test_keys_for_accelerate_are_those_that_it_has():
    names = {field.name for field in dataclasses.fields(AcceleratorConfig)}
    assert {*KEYS["accelerator_config"]} == names - {"use_configured_state"}
    for wrong, line in (({"split": True}, "split_batches"), ("a.json", "must be a dict of split")):
        with pytest.raises(ValueError, match=f"accelerator_config.*{line}"):
            lab.plan("sft", "tiny", accelerator_config=wrong)
    assert lab.plan("sft", "tiny", accelerator_config={"even_batches": False})


@pytest.mark.parametrize("stage", ["ppo", "rloo", "grpo", "distill"])
def test_a_response_has_a_length(stage):
    """TRL would sample up to what the model reads."""
    with pytest.raises(ValueError, match="^response_length must be a (whole )?number.*, got None$"):
        lab.plan(stage, "tiny", response_length=None)


def test_a_generation_by_its_other_name_is_planned_and_trained_alike():
    """The lab's own steps_per_generation would be a second word for it, which TRL refuses."""
    plan = lab.plan("rloo", "tiny", generation_batch_size=96)
    assert "steps_per_generation" not in plan.settings
    assert plan.config().steps_per_generation == plan.estimate.setup.steps_per_generation == 3


def branches(trainer: type, name: str, of: str = "loss_type", where: str = "_compute_loss"):
    """The loss types in whose branch of TRL's loss a field of the trainer is read; or the same of
    another setting that branches."""
    source = textwrap.dedent(inspect.getsource(getattr(trainer, where)))
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith(tuple("\"')]")):
            body = "\n".join(map(ast.unparse, node.body))
            compares = of in ast.unparse(node.test).split()[0]
            if compares and f"self.{name}" in body:
                found |= {x.value for x in ast.walk(node.test) if isinstance(x, ast.Constant)}
    return found


@pytest.mark.parametrize(
    ("stage", "setting", "read"),
    [
        ("dpo", "label_smoothing", "label_smoothing"),
        ("dpo", "discopop_tau", "args.discopop_tau"),
        ("dpo", "beta", "beta"),
        ("grpo", "epsilon", "epsilon_low epsilon_high"),  # the one stands in for the other
        ("grpo", "epsilon_high", "epsilon_high"),
        ("grpo", "delta", "args.delta"),
        ("grpo", "sapo_temperature_neg", "args.sapo_temperature_neg"),
        ("grpo", "sapo_temperature_pos", "args.sapo_temperature_pos"),
        ("grpo", "vespo_k_pos", "args.vespo_k_pos"),
    ],
)
def test_a_setting_of_one_loss_is_refused_with_another(stage, setting, read):
    """TRL takes `label_smoothing` with its default loss, sigmoid, which does not read it."""
    trainer = getattr(trl, f"{stage.upper()}Trainer")
    losses = set().union(*(branches(trainer, field) for field in read.split()))
    (needed,) = [needed for term, needed in NEEDS if term in (setting, f"{stage}.{setting}")]
    assert losses == {*needed.removeprefix("loss_type=").split("|")} - {""}
    fields = dataclasses.fields(resolve(STAGES[stage].config))
    field = next(field for field in fields if field.name == "loss_type")
    default = "sigmoid" if stage == "dpo" else field.default  # a list of it
    assert (default in losses) == ("=|" in needed)
    without = next(loss for loss in WORDS[f"{stage}.loss_type"] if loss not in losses)
    for loss in ({} if "=|" not in needed else {"loss_type": without}, {"loss_type": without}):
        with pytest.raises(ValueError, match=f"^{setting}=0.1 needs loss_type="):
            lab.plan(stage, "tiny", **loss, **{setting: 0.1})
        assert lab.plan(stage, "tiny", **loss).trainer_settings  # nor is a default in the way
    for loss in losses:
        more = {"label_smoothing": 0.1} if loss == "exo_pair" else {}
        assert lab.plan(stage, "tiny", loss_type=loss, **{setting: 0.1, **more})


def test_scales_of_rewards_are_of_their_sum_alone():
    where = "_generate_and_score_completions"
    read = branches(trl.GRPOTrainer, "scale_rewards", "multi_objective_aggregation", where)
    assert read == {"sum_then_normalize"}
    other = {"multi_objective_aggregation": "normalize_then_sum"}
    assert lab.plan("grpo", "tiny", **other)
    with pytest.raises(
        ValueError, match="^scale_rewards='batch' needs multi_objective_aggregation"
    ):
        lab.plan("grpo", "tiny", scale_rewards="batch", **other)


@pytest.mark.parametrize("stage", TRAINABLE)
def test_smoothed_labels_are_of_one_loss(stage):
    """transformers makes a smoother; only SFT's loss of TRL's trainers calls it, in one branch."""
    smooth = {"label_smoothing_factor": 0.1}
    trainer = resolve(STAGES[stage].trainer or "rlhf_lab.ppo.trainer:PPOTrainer")
    reads = any(
        "self.label_smoother" in inspect.getsource(inspect.getmodule(base))
        for base in trainer.__mro__
        if base.__module__.startswith(("trl", "rlhf_lab"))
    )
    assert reads == (stage == "sft")
    if reads:
        assert lab.plan(stage, "tiny", **smooth)
        smooth["loss_type"] = "dft"
    with pytest.raises(ValueError, match="^label_smoothing_factor(=0.1 needs loss| has no effect)"):
        lab.plan(stage, "tiny", **smooth)


OF_LORA = {
    "lora_alpha": 32,
    "lora_dropout": 0.1,
    "lora_target_modules": ["q_proj"],
    "use_rslora": True,
    "use_dora": True,
}


@pytest.mark.parametrize("name", OF_LORA)
def test_adapters_that_are_not_asked_for_are_no_whole_model_in_silence(name):
    with pytest.raises(ValueError, match=f"^{name}.* needs lora_r: set both, or leave {name} out"):
        lab.plan("sft", "tiny", **{name: OF_LORA[name]})
    with pytest.raises(ValueError, match="needs lora_r"):
        lab.plan("sft", "tiny", lora_r=0, **{name: OF_LORA[name]})
    assert lab.plan("sft", "tiny", lora_r=4, **{name: OF_LORA[name]}).lora["r"] == 4


def test_schedules_that_want_more_are_refused_without_it():
    from transformers import get_scheduler

    for name in WORDS["ppo.lr_scheduler_type"]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
        try:
            get_scheduler(name, optimizer, 2, 10)
        except (TypeError, ValueError):  # late in training
            with pytest.raises(ValueError, match=f"'{name}' needs lr_scheduler_kwargs: set both"):
                check_settings("ppo", {"lr_scheduler_type": name})
        else:
            assert check_settings("ppo", {"lr_scheduler_type": name})


def test_from_half_on_smoothed_labels_would_teach_the_worse_answer():
    """The expected loss of pairs of which a share is the wrong way round: its gradient at a margin
    of 0 raises the better answer below a half, and does nothing or the contrary above."""
    for share in (0.001, 0.1, 0.4, 0.499, 0.5, 0.6, 0.9):
        margin = torch.zeros((), requires_grad=True)
        right, wrong = (torch.nn.functional.logsigmoid(x) for x in (margin, -margin))
        (-(1 - share) * right - share * wrong).backward()
        settings = {"loss_type": "robust", "label_smoothing": share}
        if margin.grad < -1e-6:
            assert check_settings("dpo", settings)
        else:
            with pytest.raises(ValueError, match=r"label_smoothing must be 0 or more, below 0\.5"):
                check_settings("dpo", settings)


def test_seeds_are_those_that_numpy_and_torch_take():
    import numpy as np

    def takes(seed, use) -> bool:
        try:
            return use(seed) is not False
        except (ValueError, RuntimeError):
            return False

    seeds = (0, 2**32 - 1, 2**32, 2**40, 2**64 - 1, 2**64)
    for name, use in (
        ("seed", np.random.RandomState().seed),
        ("data_seed", torch.Generator().manual_seed),
    ):
        ours = [takes(seed, lambda s, n=name: check_settings("sft", {n: s})) for seed in seeds]
        assert ours == [takes(seed, use) for seed in seeds], name


TARGETS = [
    (["q_proj", "v_proj"], True),
    (["layers.0.self_attn.q_proj"], True),
    (["embed_tokens"], True),
    (r".*\.(q|v)_proj", True),
    ("q_proj", False),
    (["norm"], False),
    (["nope"], False),
]


@pytest.mark.parametrize(("targets", "there"), TARGETS)
def test_matrices_to_adapt_are_those_that_peft_finds(targets, there):
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = lab.load("tiny").config_dict()
    with torch.device("meta"):
        kind = {k: v for k, v in config.items() if k != "model_type"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **kind))
    try:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=targets), model)
        found = True
    except ValueError:
        found = False
    assert found == there
    if there:
        assert lab.plan("sft", "tiny", lora_r=2, lora_target_modules=targets)
    else:
        with pytest.raises(ValueError, match="choose 'all-linear' or a list of q_proj, k_proj"):
            lab.plan("sft", "tiny", lora_r=2, lora_target_modules=targets)


@pytest.mark.parametrize("name", ["nope", "lm_head"])
def test_one_wrong_name_among_right_ones_is_not_passed_over(name):
    """peft passes over it, and TRL reads the weights of the head past their adapter."""
    with pytest.raises(ValueError, match=f"^lora_target_modules=.*{name}"):
        lab.plan("sft", "tiny", lora_r=2, lora_target_modules=["q_proj", name])


def test_no_row_is_longer_than_the_model_reads():
    for name in ("max_length", "pad_to_multiple_of"):
        assert lab.plan("sft", "tiny", **{name: 1024}).settings[name] == 1024
    with pytest.raises(ValueError, match="^max_length=1025: tiny reads 1024 tokens"):
        lab.plan("sft", "tiny", max_length=1025)
    with pytest.raises(ValueError, match="^pad_to_multiple_of=1025: .* more than the 1024 that"):
        lab.plan("sft", "tiny", pad_to_multiple_of=1025)
    auto = lab.plan("sft", "tiny", pad_to_multiple_of="auto")  # TRL's default: none but on Neuron
    assert auto.peak == lab.plan("sft", "tiny").peak
    assert lab.plan("sft", "bigscience/bloom-560m", max_length=4096)  # ALiBi: of any length


def test_warm_up_by_its_old_name_is_a_share_by_its_new_one(tmp_path):
    """transformers 5 has no `warmup_ratio`: below 1 `warmup_steps` is one."""
    line = r"did you mean 'warmup_steps'\? \(below 1 it is a share of all steps\)"
    with pytest.raises(ValueError, match=line):
        lab.plan("sft", "tiny", warmup_ratio=0.1)
    (file := tmp_path / "trl.yaml").write_text("model_name_or_path: tiny\nwarmup_ratio: 0.1")
    with pytest.raises(ValueError, match=line) as refused:
        as_flags(file, "sft")
    assert str(refused.value).startswith(f"{file}: ")
    args = lab.plan("sft", "tiny", warmup_steps=0.1).config()
    assert args.get_warmup_steps(200) == 20
    assert lab.plan("sft", "tiny", warmup_steps=7).config().get_warmup_steps(200) == 7


def test_models_with_images_are_planned_and_said_to_be_no_language_models():
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    nested = {
        kind
        for kind in CONFIG_MAPPING
        if "text_config" in (getattr(CONFIG_MAPPING[kind], "sub_configs", None) or {})
        and CONFIG_MAPPING[kind] in AutoModelForCausalLM._model_mapping
    }
    assert nested == WITH_MORE
    plan = lab.plan("sft", "Qwen/Qwen2.5-VL-3B-Instruct", hardware="h100")
    line = "planned only: qwen2_5_vl does not load as a language model"
    assert str(plan.show()).startswith(line)
    with pytest.raises(ValueError, match=line):
        check_first(plan)
    loads = lab.plan("sft", "google/gemma-3-4b-pt", hardware="h100")
    assert not any("planned only" in x for x in loads.warnings) and plan.model.context == 128_000


def test_a_models_own_code_is_trusted_where_the_plan_says_so(tmp_path):
    """TRL's setting of that name was taken and had no effect."""
    (tmp_path / "config.json").write_text(json.dumps(lab.load("tiny").config_dict()))
    for asked in (True, False):
        plan = lab.plan("sft", tmp_path, trust_remote_code=asked)
        assert plan.model.trust_remote_code is asked and "trust_remote_code" not in plan.settings
    with pytest.raises(ValueError, match="say it where the model is loaded"):
        lab.plan("sft", lab.load(tmp_path), trust_remote_code=True)
