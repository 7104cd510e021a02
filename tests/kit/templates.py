"""Chat templates that travel in installed packages, small ones of our own with their awkward rules,
and a tokenizer for any of them."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

SPECIAL = re.compile(
    r"<\|[^|<>'\"{}]+\|?>|<[a-z]+\|>|<｜[^｜<>]+｜>|<[a-z]+_of_[a-z]+>|\[gMASK\]|<sop>|</?s>|<bos>|<eos>"
)
"""What is a token of its own in these families: `<|im_end|>`, `<｜User｜>`, `<end_of_turn>`, …"""


@dataclass(frozen=True)
class Case:
    """A template, its tokenizer's bos and eos, and by hand what it writes: `asks` ends the prompt
    of one user turn, `answers` is how it answers "Nobody." (None: it cannot be trained on)."""

    template: str
    eos: str
    asks: str
    answers: str | None
    rule: str = ""

    @property
    def end(self) -> str | None:
        """The token that ends the turn."""
        return None if self.answers is None else SPECIAL.findall(self.answers)[-1]


# By hand, from the templates' text. Where `answers` ends in an eos that the template does not
# write, it is appended.
IM_END = "Nobody.<|im_end|>"
TRL = {
    "cohere": ("<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "Nobody.<|END_OF_TURN_TOKEN|>"),
    "cohere2": (
        "<|END_OF_TURN_TOKEN|>",
        "<|START_RESPONSE|>",
        "Nobody.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ),
    "deepseek_r1_distill": ("<｜end▁of▁sentence｜>", "<think>\n", None),
    "deepseekv3": ("<｜end▁of▁sentence｜>", "<think>\n", None),
    "gemma": ("<eos>", "<start_of_turn>model\n", "Nobody.<end_of_turn>"),
    "gemma3": ("<eos>", "<start_of_turn>model\n", "Nobody.<end_of_turn>"),
    "gemma4": ("<eos>", "<|turn>model\n", "Nobody.<turn|>"),
    "glm4moe": ("<|endoftext|>", "<|assistant|>", "\n<think></think>\nNobody.<|endoftext|>"),
    "gptoss": (
        "<|return|>",
        "<|start|>assistant",
        "<|channel|>final<|message|>Nobody.<|return|>",
    ),
    "idefics3": ("<|end_of_text|>", "\nAssistant:", " Nobody.<end_of_utterance>"),
    "lfm2": ("<|im_end|>", "<|im_start|>assistant\n", IM_END),
    "lfm2_v2": ("<|im_end|>", "<|im_start|>assistant\n", IM_END),
    "llama3": ("<|end_of_text|>", "assistant<|end_header_id|>\n\n", "Nobody.<|eot_id|>"),
    "llama3_2": ("<|end_of_text|>", "assistant<|end_header_id|>\n\n", "Nobody.<|eot_id|>"),
    "llava_next": ("</s>", " [/INST]", " Nobody.</s>"),
    "muse_glimmer": ("<|end_of_text|>", "<|start|>assistant", " to=user<|message|>Nobody.<|eot|>"),
    "nemotron_3_nano": ("<|im_end|>", "<think>\n", None),
    "phi3": ("<|endoftext|>", "<|assistant|>\n", "Nobody.<|end|>"),
    "qwen2_5": ("<|endoftext|>", "<|im_start|>assistant\n", IM_END),
    "qwen3": ("<|im_end|>", "<|im_start|>assistant\n", f"<think>\n\n</think>\n\n{IM_END}"),
    "qwen3_5_nothink": ("<|im_end|>", "<think>\n\n</think>\n\n", IM_END),
    "qwen3_5_think": ("<|im_end|>", "<think>\n", f"\n</think>\n\n{IM_END}"),
    "smolvlm": ("<|im_end|>", "\nAssistant:", " Nobody.<end_of_utterance>"),
}
TURNS = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
OPENS = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
OURS = {
    "no system role": (
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
        + TURNS
        + "<|end|>"
        + OPENS,
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
    "strict alternation, spaces around": (
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}",
        "</s>",
        " [/INST]",
        " Nobody. </s>",
    ),
    "content in parts": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content[0].text }}<|end|>" + OPENS,
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
    "today's date": (
        "<|system|>Today is {{ strftime_now('%d %B %Y') }}.<|end|>" + TURNS + "<|end|>" + OPENS,
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
    "a generation prompt that is no beginning": (
        "{% for m in messages %}{% if m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}</s>\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response: {% endif %}",
        "</s>",
        "### Response: ",
        None,
    ),
    "nothing ends a turn": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        "</s>",
        "assistant: ",
        "Nobody.</s>",
    ),
    "an answer is always opened": (
        TURNS + "<|end|>{% endfor %}<|assistant|>",
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
    "two tokens end a turn": (
        TURNS + "<|end|></s>" + OPENS,
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|></s>",
    ),
    "eos closes the whole": (
        TURNS + "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
        "{% else %}{{ eos_token }}{% endif %}",
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
    "content is trimmed": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "</s>",
        "<|assistant|>\n",
        "Nobody.<|end|>",
    ),
    "a template by name": (
        {"default": TURNS + "<|end|>" + OPENS, "tool_use": TURNS + "<|end|>" + OPENS},
        "</s>",
        "<|assistant|>",
        "Nobody.<|end|>",
    ),
}


def names() -> list[str]:
    return [*TRL, *OURS]


def case(name: str) -> Case:
    """A case by name; skipped where TRL is too old to bring the template."""
    if name in OURS:
        return Case(*OURS[name])
    return Case(of_trl(name), *TRL[name])


def of_trl(name: str) -> str:
    """A template of TRL's; skipped where TRL is too old to bring it."""
    home = importlib.util.find_spec("trl")
    assert home is not None and home.submodule_search_locations
    file = Path(home.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja"
    if not file.is_file():
        pytest.skip(f"this TRL brings no chat_templates/{name}.jinja")
    return file.read_text()


def chat_tokenizer(template, eos: str = "</s>", bos: str | None = "<s>", begins: bool = False):
    """A byte-level tokenizer without merges, so that ids of a joint text are those of its parts, in
    which the template's special tokens are one token each."""
    from tokenizers import AddedToken, Tokenizer, processors
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    letters = {c: i for i, c in enumerate(sorted(ByteLevel.alphabet()))}
    made = Tokenizer(BPE(letters, []))
    made.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    from tokenizers.decoders import ByteLevel as Decoder

    made.decoder = Decoder()
    known = SPECIAL.findall(str(template))
    if "'<|' + " in str(template) or "<|{{" in str(template):
        known += [f"<|{role}|>" for role in ("user", "assistant", "system", "tool")]
    special = dict.fromkeys(t for t in [bos, eos, "<|pad|>", *known] if t)
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    made.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    if begins:
        one = made.token_to_id(bos)
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, one)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=eos, bos_token=bos, pad_token="<|pad|>"
    )
    tokenizer.chat_template = template
    return tokenizer
