"""Every stage reads a conversation as the model's own chat template writes it.

pytest tests/data/test_chat.py

Templates come from TRL's package and from `kit/templates.py`; what each writes stands there by
hand. The cases are rows 2, 3, 4, 12, 15 and 16 of the list of models that once went wrong.
"""

from __future__ import annotations

import json

import mistral
import pytest
from templates import OURS, TRL, case, chat_tokenizer, names

from rlhf_lab.data import tokenize
from rlhf_lab.data.chat import GOES_ON, LEFT_OUT, NO_BEGINNING, chat_format, remedy
from rlhf_lab.data.tokenize import encode_prompt, encode_response, stop_ids
from rlhf_lab.models.tokenizer import CHAT_TEMPLATE

WHO = [{"role": "user", "content": "Who?"}]
ROW = {
    "prompt": WHO,
    "completion": "Nobody.",
    "chosen": "Nobody.",
    "rejected": "Me.",
    "label": True,
}


def plain(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


TOKENIZE = (
    tokenize.sft_rows,
    tokenize.pair_rows,
    tokenize.whole_pair_rows,
    tokenize.labelled_rows,
    tokenize.prompt_rows,
)
"""What makes token ids of rows: for SFT, DPO, the reward model, KTO, and the stages that sample."""


def of_all_stages(tokenizer, row: dict) -> dict[str, tuple[list[int], list[int]]]:
    """Prompt and (good) answer of one row as each stage's trainer is given them."""
    ((sft,), _), ((pair,), _), ((whole,), _), ((kto,), _), ((online,), _) = (
        make(tokenizer, [row], 10_000) for make in TOKENIZE
    )
    prompt, asked = sft["completion_mask"].count(0), online["prompt_ids"]
    return {
        "sft": (sft["input_ids"][:prompt], sft["input_ids"][prompt:]),
        "dpo": (pair["prompt_ids"], pair["chosen_ids"]),
        "kto": (kto["prompt_ids"], kto["completion_ids"]),
        # PPO samples after `asked`: what the reward model learned to score begins with it.
        "reward": (whole["chosen_ids"][: len(asked)], whole["chosen_ids"][len(asked) :]),
    }


@pytest.mark.parametrize("name", names())
def test_row_15_every_stage_learns_the_templates_own_turn(name):
    """Row 15, 2: identical ids everywhere, the prompt their beginning, the right end of turn
    learned and stopped at. The oracle is the text written by hand in `kit/templates.py`."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    if found.answers is None:
        rows, counts = tokenize.sft_rows(tokenizer, [ROW], 10_000)
        assert (
            rows == [] and counts[NO_BEGINNING] == 1 and "reasoning_content" in remedy(NO_BEGINNING)
        )
        assert encode_prompt(tokenizer, WHO)  # PPO may sample what it will
        return
    asked = tokenizer.decode(encode_prompt(tokenizer, WHO))
    assert asked.endswith(found.asks) and "Who?" in asked
    expected = plain(tokenizer, asked), plain(tokenizer, found.answers)
    for stage, ids in of_all_stages(tokenizer, ROW).items():
        assert ids == expected, stage
    assert expected[1][-1] == tokenizer.convert_tokens_to_ids(found.end)
    assert {expected[1][-1], tokenizer.eos_token_id} == set(stop_ids(tokenizer)), found.end
    # What is learned is stopped at, and nothing before it.
    assert not set(expected[1][:-1]) & set(stop_ids(tokenizer))


@pytest.mark.parametrize("name", [n for n in names() if {**TRL, **OURS}[n][-1]])
def test_the_transformers_template_writes_the_same(name):
    """The whole conversation, as transformers writes it, begins with what is trained on."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    talk = [*WHO, {"role": "assistant", "content": "Nobody."}]
    if chat_format(tokenizer).in_parts:
        talk = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    ours = tokenizer.decode(
        encode_prompt(tokenizer, WHO) + encode_response(tokenizer, "Nobody.", WHO)
    )
    assert whole.startswith(ours.removesuffix(found.eos))  # appended where it ends no turn


REFUSED = [
    ("no system role", [{"role": "system", "content": "Be kind."}, *WHO], "No system role"),
    ("gemma", [{"role": "system", "content": "Be kind."}, *WHO], "System role not supported"),
    ("strict alternation, spaces around", [*WHO, *WHO], "Roles must alternate"),
    ("qwen3", [{"role": "umpire", "content": "Play."}, *WHO], "leaves out a turn of umpire"),
]


@pytest.mark.parametrize("name, prompt, why", REFUSED, ids=[n for n, *_ in REFUSED])
def test_row_15_one_refused_row_is_left_out_and_counted(name, prompt, why):
    """Row 15: a row that the template refuses, or a turn that it loses without a word, costs that
    row and not the run, in every stage; the message tells what to do."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    for make in TOKENIZE:
        rows, counts = make(tokenizer, [ROW, {**ROW, "prompt": prompt}], 10_000)
        (reason,) = (r for r in counts if counts[r])
        assert len(rows) == 1 and counts[reason] == 1 and why in reason and remedy(reason)


def test_the_reasoning_of_an_answer_is_written_or_the_row_is_left_out():
    """Qwen 3 has a place for it, Llama 3 has none."""
    answer = [{"role": "assistant", "content": "Nobody.", "reasoning_content": "It is dark."}]
    found = case("qwen3")
    qwen = chat_tokenizer(found.template, found.eos)
    assert qwen.decode(encode_response(qwen, answer, WHO)) == (
        "<think>\nIt is dark.\n</think>\n\nNobody.<|im_end|>"
    )
    nemotron = case("nemotron_3_nano")  # opens the thought itself: it has to go on with one
    tokenizer = chat_tokenizer(nemotron.template, nemotron.eos)
    assert tokenizer.decode(encode_response(tokenizer, answer, WHO)).startswith("It is dark.")
    llama = chat_tokenizer(case("llama3").template, "<|end_of_text|>")
    rows, counts = tokenize.sft_rows(llama, [{**ROW, "completion": answer}], 10_000)
    assert not rows and counts["the chat template leaves out the reasoning of an answer"] == 1


THOUGHTS_CUT = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""As DeepSeek-R1's first template: no thoughts of any turn."""
REASONING_LEFT_OUT = f"{LEFT_OUT} the reasoning of an answer"


def test_thoughts_in_tags_that_a_template_cuts_from_an_answer_cost_the_row():
    """Else the model learns not to think, and pairs that differ in thoughts alone are one answer.
    A thought that says no more than the answer does is missed too. Those of earlier turns go."""
    cuts, keeps = map(chat_tokenizer, (THOUGHTS_CUT, OURS["eos closes the whole"][0]))
    answers = "<think>Dark.</think>Nobody.", "<think>Nobody.</think>Nobody."
    row = {**ROW, "completion": answers[1], "chosen": answers[0], "rejected": answers[1]}
    for make in TOKENIZE[:-1]:
        rows, counts = make(cuts, [row], 10_000)
        assert not rows and {k: n for k, n in counts.items() if n} == {REASONING_LEFT_OUT: 1}
        assert len(make(keeps, [row], 10_000)[0]) == 1
    assert remedy(REASONING_LEFT_OUT) and tokenize.prompt_rows(cuts, [row], 10_000)[0]
    assert keeps.decode(encode_response(keeps, answers[0], WHO)) == answers[0] + "<|end|>"
    earlier = [*WHO, {"role": "assistant", "content": answers[0]}, *WHO]
    ((kept,), _) = tokenize.sft_rows(cuts, [{**ROW, "prompt": earlier}], 10_000)
    assert "Nobody.<|end|><|user|>" in cuts.decode(kept["input_ids"])
    # A reward model reads what was sampled as its template writes it.
    assert cuts.decode(encode_response(cuts, answers[0], WHO)) == "Nobody.<|end|>"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "glm4moe", "deepseek_r1_distill"])
def test_thoughts_in_tags_are_written_in_the_templates_own_way(name):
    """With its line breaks; R1's opens a thought, and cuts it from the answer."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    row = {**ROW, "completion": "<think>Dark.</think>Nobody."}
    rows, counts = tokenize.sft_rows(tokenizer, [row], 10_000)
    if name == "deepseek_r1_distill":
        assert not rows and counts[NO_BEGINNING] == 1
    else:
        answer = tokenizer.decode(rows[0]["input_ids"])
        assert answer.index("<think>") < answer.index("Dark.") < answer.index("Nobody.")


def test_reasoning_goes_by_the_name_that_a_template_knows():
    """gpt-oss' calls it `thinking`."""
    found = case("gptoss")
    tokenizer = chat_tokenizer(found.template, found.eos)
    answer = [{"role": "assistant", "content": "Nobody.", "reasoning_content": "It is dark."}]
    assert tokenizer.decode(encode_response(tokenizer, answer, WHO)) == (
        "<|channel|>analysis<|message|>It is dark.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Nobody.<|return|>"
    )


@pytest.mark.parametrize("name", ["qwen3", "llama3", "gemma", "content in parts", "phi3"])
def test_row_12_the_assistants_own_beginning_is_continued(name):
    """Row 12: no second assistant turn is opened after a beginning that is there."""
    found = case(name)
    tokenizer = chat_tokenizer(found.template, found.eos)
    begun = [*WHO, {"role": "assistant", "content": "No"}]
    whole = encode_prompt(tokenizer, WHO) + encode_response(tokenizer, "Nobody.", WHO)
    prompt, answer = encode_prompt(tokenizer, begun), encode_response(tokenizer, "body.", begun)
    assert prompt + answer == whole and tokenizer.decode(prompt).endswith("No")
    assert answer == plain(tokenizer, f"body.{found.end}")


@pytest.mark.parametrize("end", ["</s>", "</s>\n", "</s></s>", "<|end|>"])
@pytest.mark.parametrize("prompt", ["Who?\n", WHO], ids=["text", "conversation"])
def test_row_3_an_answer_that_brings_its_end_has_it_once(prompt, end):
    """Row 3: once in SFT, RM, DPO and KTO, whatever of the turn's ends the answer came with."""
    template = OURS["eos closes the whole"][0]
    tokenizer = chat_tokenizer(template)
    row = {**ROW, "prompt": prompt, "completion": f"Nobody.{end}", "chosen": f"Nobody.{end}"}
    first = "<|end|>" if "<|end|>" in end else "</s>"
    for stage, (_, answer) in of_all_stages(tokenizer, row).items():
        assert answer == plain(tokenizer, f"Nobody.{first}"), stage


def test_an_answer_that_goes_on_after_an_end_is_left_out():
    """Row 3: no response that is sampled goes on; several messages do, with an end after each."""
    tokenizer = chat_tokenizer(OURS["eos closes the whole"][0])
    for make, column in ((tokenize.sft_rows, "completion"), (tokenize.pair_rows, "rejected")):
        for end in ("</s>", "<|end|>"):
            rows, counts = make(tokenizer, [ROW, {**ROW, column: f"No{end}body."}], 10_000)
            assert len(rows) == 1 and counts[GOES_ON] == 1 and remedy(GOES_ON)
    several = [{"role": "assistant", "content": x} for x in ("Well.", "Nobody.")]
    assert len(tokenize.sft_rows(tokenizer, [{**ROW, "completion": several}], 10_000)[0]) == 1


def test_an_eos_that_reads_as_space_ends_an_answer_once():
    tokenizer = chat_tokenizer(CHAT_TEMPLATE, eos="\n")
    for answer in ("Nobody.", "Nobody.\n", "Nobody.\n\n"):
        assert encode_response(tokenizer, answer, WHO) == plain(tokenizer, "Nobody.\n")


def test_the_end_of_turn_is_found_where_a_system_turn_is_asked_for():
    """Row 15: a template that wants one turn more than the question with which it is tried."""
    wants = "{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"
    tokenizer = chat_tokenizer(wants + OURS["an answer is always opened"][0])
    assert [tokenizer.decode(i) for i in stop_ids(tokenizer)] == ["</s>", "<|end|>"]
    talk = [{"role": "system", "content": "Be kind."}, *WHO]
    assert encode_response(tokenizer, "Nobody.", talk) == plain(tokenizer, "Nobody.<|end|>")


def test_parts_are_no_remedy_where_a_template_would_write_them_as_python_does():
    """Row 15: here a text with an "o" is refused, and a list of parts is not."""
    refuses = "{% for m in messages %}{% if 'o' in m.content %}{{ raise_exception('no o') }}"
    template = refuses + "{% endif %}{% endfor %}" + OURS["an answer is always opened"][0]
    tokenizer = chat_tokenizer(template)
    rows, counts = tokenize.sft_rows(tokenizer, [ROW], 10_000)
    assert not rows and counts["the chat template refuses it: no o"] == 1
    kind = [{"role": "user", "content": "Me?"}]
    assert "type" not in tokenizer.decode(encode_prompt(tokenizer, kind))


def test_row_4_bos_once_in_text_prompts_and_conversations():
    """Row 4: a text that begins with bos gets no second one; messages on a model without a template
    begin with bos where its text prompts do."""
    from rlhf_lab.models.tokenizer import plain_template

    for begins in (True, False):
        tokenizer = chat_tokenizer(None, begins=begins)
        bos = tokenizer.bos_token_id
        assert encode_prompt(tokenizer, "<s>Who?").count(bos) == 1
        assert encode_prompt(tokenizer, "Who?").count(bos) == begins
        tokenizer.chat_template = plain_template(tokenizer)
        ids = encode_prompt(tokenizer, WHO)
        assert ids.count(bos) == begins and (ids[0] == bos) == begins
        assert tokenizer.decode(ids, skip_special_tokens=True) == "user: Who?\nassistant: "
        assert encode_response(tokenizer, "Nobody.", WHO) == plain(tokenizer, "Nobody.</s>")


def test_the_generation_configs_ends_are_stopped_at_too():
    """Row 2: a list beside the model adds to the stop set; one id that a config class may have as
    its default does not."""
    from transformers import GenerationConfig

    tokenizer = chat_tokenizer(TEMPLATE := OURS["no system role"][0])
    ids = tokenizer.convert_tokens_to_ids(["</s>", "<|end|>", "<|user|>"])
    assert stop_ids(tokenizer) == tuple(ids[:2])
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=[ids[2], ids[0]])) == tuple(ids)
    assert stop_ids(tokenizer, GenerationConfig(eos_token_id=2)) == tuple(ids[:2])
    tokenizer.chat_template = TEMPLATE.replace("<|end|>", "</s>")  # found out anew
    assert stop_ids(tokenizer) == (ids[0],)


def test_who_ends_turns_with_what_is_told_as_it_is():
    """The table in docs/your_model.md names the token of every template of TRL's that is read."""
    from pathlib import Path

    page = (Path(__file__).parents[2] / "docs" / "your_model.md").read_text()
    for name in TRL:
        found = case(name)
        (line,) = (x for x in page.splitlines() if f"`{name}`" in x and x.startswith("|"))
        assert (f"`{found.end}`" if found.end else "left out") in line.replace("\\|", "|"), line


# ------------------------------------------------------------------------------- real tokenizers


KINDS = ["SentencePiece", "SentencePiece, legacy", "tekken"]


@pytest.fixture(scope="module", params=KINDS)
def real(request, tmp_path_factory):
    """A tokenizer of Mistral's, loaded as a model's is."""
    from rlhf_lab.models.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("mistral")
    if request.param == "tekken":
        made = mistral.tekken(folder)
        (folder / "tekken.json").unlink()
    else:
        made = mistral.sentencepiece(legacy="legacy" in request.param)
    made.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return load_tokenizer(folder)


ANSWERS = [
    "Yes.",
    "  two spaces",
    "\n",
    "\nA line first",
    "été",
    "1 + 1",
    "don't",
    "🙂",
    "- a\n- b",
]


@pytest.mark.parametrize("prompt", ["Who is there?\n", "Name:", "\n\nHuman: Hi\n\nAssistant:", WHO])
def test_row_16_no_stray_space_at_the_seam(real, prompt):
    """Row 16: prompt and answer read as the joint text, in its tokens wherever one of its seams is
    there, alike in every stage."""
    text = prompt
    if prompt is WHO:
        text = real.apply_chat_template(WHO, add_generation_prompt=True, tokenize=False)
    same = 0
    for answer in ANSWERS:
        ids, answered = encode_prompt(real, prompt), encode_response(real, answer, prompt)
        assert answered[-1] == real.eos_token_id and answered.count(real.eos_token_id) == 1
        joint = real(text + answer, add_special_tokens=prompt is not WHO).input_ids
        if joint[: len(ids)] == ids:
            same += 1
            assert ids + answered[:-1] == joint
        read = [real.decode(x, skip_special_tokens=True) for x in (ids + answered[:-1], joint)]
        assert read[0] == read[1]
        row = {"prompt": prompt, "completion": answer, "chosen": answer, "rejected": "x"}
        assert all(
            found == (ids, answered) for found in of_all_stages(real, row | {"label": 1}).values()
        )
    assert same >= 3


def test_bos_once_with_a_real_tokenizer(real):
    for prompt in ("Who?", "<s>Who?", WHO):
        ids = encode_prompt(real, prompt)
        begins = real("a").input_ids[0] == real.bos_token_id
        assert ids.count(real.bos_token_id) == (begins or prompt == "<s>Who?")


def test_tekken_is_read_as_mistral_reads_it(tmp_path):
    """The oracle is the library that Mistral keeps for its own models."""
    pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    ours = mistral.tekken(tmp_path)
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    for answer in ANSWERS:
        response = encode_response(ours, answer, "Who is there?\n")
        assert response == theirs.encode(answer, bos=False, eos=True)


def test_sentencepiece_is_read_as_its_pieces_say():
    """By hand: the pieces of "Hello" with and without its space, in Llama's and Mistral's files."""
    tokenizer = mistral.sentencepiece(legacy=False)
    response = encode_response(tokenizer, "Hello", "Who?\n")
    assert tokenizer.convert_ids_to_tokens(response) == ["Hello", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("Hello").input_ids)[-1] == "▁Hello"
