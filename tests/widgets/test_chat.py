"""Models side by side: what they are asked, what they answer, what is said of a prompt."""

import json

import pytest

import rlhf_lab as lab
from rlhf_lab.models.policy import find_policy
from rlhf_lab.widgets.chat import Chat
from rlhf_lab.world.gold_reward import gold_reward

PROMPT = "Write a happy story about a fox and a lantern in the cave."
EVIL = "<img src=x onerror=alert(1)>\u202e</div><script>alert(2)</script>"


def test_two_stages_and_a_run_answer_as_generate_does_with_their_gold_reward(tmp_path):
    run = made_run(tmp_path / "mine", "base")
    chat = lab.chat(("mini", "base"), "mini", run, mine_too=run)
    chat.temperature.value, chat.max_new_tokens.value = 0.7, 32
    rows = chat.ask(PROMPT)
    assert [row["model"] for row in rows] == ["mini-base", "mini", "mine", "mine_too"]
    how = {"temperature": 0.7, "max_new_tokens": 32}
    base, sft = (lab.generate("mini", PROMPT, stage=stage, **how)[0] for stage in ("base", "sft"))
    assert [row["answer"] for row in rows] == [base, sft, base, base] and base != sft
    assert [float(row["gold reward"]) for row in rows] == [
        pytest.approx(gold_reward(PROMPT, row["answer"]), abs=0.005) for row in rows
    ]
    chat.seed.value = 1
    assert chat.ask()[1]["answer"] != sft


def made_run(folder, kind: str, **changes) -> lab.Run:
    """A run whose model is one of mini's."""
    folder.mkdir(parents=True)
    (folder / "model").symlink_to(lab.load("mini").paths[kind])
    about = {"stage": "sft", "model": "mini", "data": "stories", "seed": 0, "status": "finished"}
    (folder / "run.json").write_text(json.dumps(about | changes))
    return lab.Run.load(folder)


def test_words_that_the_stories_do_not_have_are_said_and_answered():
    chat = lab.chat("mini")
    chat.max_new_tokens.value = 2
    (row,) = chat.ask("Write a happy story about a zebra and a lantern in the cave.")
    assert "do not have: zebra" in repr(chat) and row["answer"] and "gold reward" in row
    (row,) = chat.ask("Who are you?")
    assert "never learned to answer this" in repr(chat) and "gold reward" not in row
    chat.ask(PROMPT)
    assert "never learned" not in repr(chat)
    assert all(gold_reward(text, "The end.") >= 0 for _, text in chat.example.options[1:])
    chat.example.value = chat.example.options[3][1]
    assert chat.prompt.value == chat.example.value.strip()


def test_a_model_with_turns_is_asked_in_them(tmp_path, tiny):
    """One that is none of the bundled: its prompt is a user's turn of its chat template."""
    for part in (tiny.lm(), tiny.tokenizer()):
        part.save_pretrained(tmp_path)
    chat = lab.chat(random=tmp_path)
    chat.temperature.value, chat.max_new_tokens.value = 0, 16
    turn = [{"role": "user", "content": "w3 w4"}]
    answers = lab.generate(tmp_path, turn, temperature=0, max_new_tokens=16)
    assert chat.ask("w3 w4") == [{"model": "random", "answer": answers[0]}]
    assert len(chat.widget.children) == 2  # no examples of a world that is not its own


def test_a_folder_of_a_bundled_model_is_asked_as_its_name_is(tmp_path):
    """Quantised, exported, or the model folder of a run: its tokenizer says what it is."""
    (alone,) = lab.generate("mini", PROMPT, max_new_tokens=8)
    assert lab.generate(lab.load("mini").paths["sft"], PROMPT, max_new_tokens=8) == [alone]
    made_run(tmp_path / "mine", "sft", data="my rows")
    policy = find_policy(tmp_path / "mine" / "model")
    assert policy.bundled and not policy.world and policy.name == "mine"
    scorer = made_run(tmp_path / "scorer", "reward", stage="reward")
    for scores in (scorer, lab.load("mini").paths["reward"]):  # tied to an embedding, it would load
        with pytest.raises(ValueError, match="is a reward model: it scores, and writes nothing"):
            lab.generate(scores, PROMPT)


def test_what_models_write_is_text_and_what_fails_is_said():
    def fails(prompt, **settings):
        raise ValueError("no room <b>here</b>")

    chat = Chat({EVIL: lambda prompt, **settings: (EVIL, 1.25), "b": fails}, [], str)
    with pytest.raises(ValueError, match="no room"):
        chat.ask(EVIL)
    html = chat._bundle()["text/html"]
    assert "<script" not in html and "<img" not in html and "\u202e" not in html
    assert "&lt;img src=x" in html and "gold reward 1.25" in html
    assert "no room &lt;b&gt;here" in html and not chat.button.disabled
    chat._clicked(None)  # a click raises nothing: it is said on the page
    with pytest.raises(ValueError, match="chat: name a model"):
        lab.chat()
