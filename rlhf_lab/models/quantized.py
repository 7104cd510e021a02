"""Language models in 4 bits: the base of QLoRA (Dettmers et al., 2305.14314), by bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .weights import load_causal_lm

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer


def load_in_4bit(
    path: str | Path, tokenizer: Tokenizer, nested: bool = False, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A language model whose layers' matrices are in NF4; embeddings, head and norms are not.

    `nested`: the scales are quantised too. Raises ValueError, one line, without bitsandbytes or for
    a model whose matrices it cannot take.
    """
    import torch

    try:
        import bitsandbytes  # noqa: F401  transformers asks for it much later
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
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    model = load_causal_lm(
        path,
        tokenizer,
        trust_remote_code,
        quantization_config=config,
        device_map={"": device},
    )
    repacks = "support_avx512bf16_for_cpu"
    for module in model.modules():
        # On some CPUs a pass without gradients would repack the weights and multiply in bf16: the
        # first ratio of an update would not be 1 (rule 3: the first minibatch has ratio 1).
        if hasattr(module, repacks):
            setattr(module, repacks, False)
    return model
