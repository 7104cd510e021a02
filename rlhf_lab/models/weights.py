"""Weights into memory: language models and reward models, in fp32 on the CPU.

Only safetensors are read: a pickled checkpoint can run code.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..display import first_line
from .device import compute_dtype
from .hub import fetch, quiet_transformers
from .tokenizer import embedding_rows

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_causal_lm(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
    **settings: object,
) -> PreTrainedModel:
    """A language model in fp32, in eval mode (no dropout anywhere: rule 4). `settings` go to
    transformers' `from_pretrained`."""
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    return _load_weights(load, path, tokenizer, trust_remote_code, (), **settings)


def in_4bit(load: Callable[..., PreTrainedModel], nested: bool = False) -> PreTrainedModel:
    """What `load(**settings of from_pretrained)` makes, with its layers' matrices in NF4: the base
    of QLoRA (Dettmers et al., 2305.14314), by bitsandbytes; embeddings, head and norms are not.

    `nested`: the scales are quantised too. Raises ValueError, one line, without bitsandbytes or for
    a model whose matrices it cannot take.
    """
    import torch

    try:
        import bitsandbytes.nn.modules
    except ImportError:
        raise ValueError(
            "load_in_4bit needs bitsandbytes: pip install 'rlhf-lab[gpu]' (it runs on CPUs too)"
        ) from None
    from transformers import BitsAndBytesConfig

    make_config: Callable[..., object] = BitsAndBytesConfig
    config = make_config(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=compute_dtype(),
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`")  # theirs, if they are
        model = load(quantization_config=config, device_map={"": device})
    for layer in model.modules():  # files that are in 4 bits say for what device they were made
        if isinstance(layer, bitsandbytes.nn.modules.Linear4bit):
            layer.compute_dtype = compute_dtype()
    return model


def dequantised(model: PreTrainedModel) -> PreTrainedModel:
    """A model whose files are in 4 bits with its matrices written out; another as it is.
    transformers 5.23 would still save it as it read it, which it cannot."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return model
    with quiet_transformers():
        whole: PreTrainedModel = model.dequantize()
    vars(whole).pop("_weight_conversions", None)
    return whole


BLOCK = 64
"""weights that share a scale in NF4"""


def _check_4bit(model: PreTrainedModel) -> None:
    """See that 4 bits are read as they are. On a CPU bitsandbytes 0.50 reads 4-bit matrices row by
    row, and a block that lies in two rows gets the wrong scale
    (`findings/bitsandbytes_nf4_rows_that_share_a_block.sh`). Raises ValueError for a matrix that
    has one."""
    from bitsandbytes.nn.modules import Linear4bit

    for name, layer in model.named_modules():
        if not isinstance(layer, Linear4bit):
            continue
        # On some CPUs a pass without gradients would repack the weights and multiply in bf16: the
        # first ratio of an update would not be 1 (rule 3: the first minibatch has ratio 1).
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        width, on_cpu = layer.in_features, layer.weight.device.type == "cpu"
        if on_cpu and width % BLOCK and width % 2 == 0:  # odd widths it reads as one row, rightly
            raise ValueError(
                f"4 bits: {name} is {width} wide, and on a CPU bitsandbytes reads even widths that "
                f"are no multiple of {BLOCK} wrongly: use a GPU, or more bits (load_in_4bit=False)"
            )


def load_reward_model(
    path: str | Path,
    tokenizer: Tokenizer | None = None,
    trust_remote_code: bool = False,
    **settings: object,
) -> PreTrainedModel:
    """A reward model: one score per sequence, in fp32, in eval mode. `settings`: of transformers'
    `from_pretrained`.

    transformers' heads of decoders have no bias: one that the checkpoint has goes into the config's
    `score_offset`, which belongs to the head (rule 16).
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained
    try:
        settings = {"num_labels": 1, **settings}
        model = _load_weights(load, path, tokenizer, trust_remote_code, (), **settings)
        if getattr(getattr(model, "score", None), "bias", None) is None:
            offset = float(getattr(model.config, "score_offset", 0.0))
            model.config.score_offset = offset + _stored_bias(path)
        return model
    except ValueError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
    config = fetch(AutoConfig.from_pretrained, path, "config", trust_remote_code=trust_remote_code)
    raise ValueError(
        f"the model in {path} has {config.num_labels} labels: a reward model has one, its score"
    )


def _stored_bias(path: str | Path) -> float:
    """The bias of the score head in a checkpoint that was loaded already; 0 where it has none."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
    from transformers.utils.hub import cached_file

    find = partial(cached_file, str(path), _raise_exceptions_for_missing_entries=False)
    name, file = "score.bias", find(SAFE_WEIGHTS_NAME)
    if file is None and (index := find(SAFE_WEIGHTS_INDEX_NAME)):
        shard = json.loads(Path(index).read_text())["weight_map"].get(name)
        file = shard and find(shard)
    if file is None:
        return 0.0
    with safe_open(file, framework="pt") as weights:
        return float(weights.get_tensor(name)) if name in weights.keys() else 0.0


SCORE_HEAD = {"score.weight", "score.bias"}
"""The weights that a language model lacks as a reward model."""


def new_reward_model(
    path: str | Path,
    tokenizer: Tokenizer,
    seed: int = 0,
    trust_remote_code: bool = False,
    **settings: object,
) -> PreTrainedModel:
    """A reward model on the trunk of a language model, with a fresh score head. `settings`: of
    transformers' `from_pretrained`.

    The head is drawn with standard deviation 1/√(d+1), d its input width (Huang et al.
    2403.17031, detail 11).
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    load = AutoModelForSequenceClassification.from_pretrained
    settings = {"num_labels": 1, **settings}
    model = _load_weights(load, path, tokenizer, trust_remote_code, SCORE_HEAD, **settings)
    head = model.get_parameter("score.weight")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        head.copy_(torch.randn(head.shape, generator=generator) / (head.shape[1] + 1) ** 0.5)
    return model


def _load_weights(
    load: Callable[..., object],
    path: str | Path,
    tokenizer: Tokenizer | None,
    trust_remote_code: bool,
    may_lack: Collection[str] = (),
    **settings: object,
) -> PreTrainedModel:
    """Load weights and make room for every token of the tokenizer.

    transformers draws at random what a checkpoint lacks, and says so in a warning: here only what
    `may_lack` names may be missing.
    """
    import torch

    with quiet_transformers():
        loaded = fetch(
            load,
            path,
            "model",
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **{"dtype": torch.float32, **settings},
        )
        assert isinstance(loaded, tuple)  # since the loading info is asked for
        model: PreTrainedModel = loaded[0]
        info: dict[str, list[str]] = loaded[1]
        if missing := sorted(set(info["missing_keys"]) - set(may_lack)):
            head_only = set(missing) <= SCORE_HEAD
            what = "no score head" if head_only else f"{len(missing)} weights missing"
            kind = "reward" if "num_labels" in settings else "language"
            raise ValueError(
                f"cannot load a model from {path}: {what} ({missing[0]}, …): not a {kind} model, "
                "or not a whole one"
            )
        model.train(False)
        if getattr(model, "is_loaded_in_4bit", False):
            _check_4bit(model)
        if tokenizer is not None:
            align_special_tokens(model, tokenizer)
            grow_embeddings(model, embedding_rows(tokenizer))
        if hasattr(model, "generation_config"):
            _mend_generation_config(model.generation_config, path)
    return model


def grow_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Give a model an embedding for every token id below `rows`; more than it has stay. New ones
    are drawn near the mean, the same in every copy: policy and reference begin as one model."""
    import torch

    if embeddings(model) < rows:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.resize_token_embeddings(rows)


def embeddings(model: PreTrainedModel) -> int:
    """How many token ids a model has an embedding for."""
    return int(model.get_input_embeddings().get_parameter("weight").shape[0])


def align_special_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    """Let a model's configs name the tokenizer's bos, eos and pad token, so that what is saved
    after a stage ends, and pads, as it was trained. Further ends of turns that a generation config
    declares are the tokenizer's `stop_token_ids`, and are written again when it is saved."""
    generation = getattr(model, "generation_config", None)
    for config in (model.config, model.config.get_text_config(), generation):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if config is not None and getattr(tokenizer, name) is not None:
                setattr(config, name, getattr(tokenizer, name))


def _mend_generation_config(config: GenerationConfig, path: str | Path) -> None:
    """Unset what transformers reads but refuses to write, or a model would be lost when it is saved
    after training: flags that have no effect. Where only `do_sample` is missing, it is set."""
    for _ in range(3):  # one fault may hide another
        try:
            config.validate(strict=True)
            return
        except ValueError as error:
            problem = str(error)
        if config.do_sample is None and "`do_sample` is not set" in problem:
            config.do_sample = True
            continue
        for name in [n for n in config.to_diff_dict() if f"`{n}`" in problem]:
            setattr(config, name, None)
    raise ValueError(
        f"the model in {path} could not be saved after training: transformers refuses to write its "
        f"generation config ({first_line(problem)}): mend its generation_config.json"
    )
