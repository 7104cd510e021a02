"""report.html from synthetic runs, read back with an HTML parser."""

from html.parser import HTMLParser

import pytest

from rlhf_lab.charts.report import write_report
from rlhf_lab.runs.ledger import Ledger
from rlhf_lab.runs.run import Run


class Page(HTMLParser):
    """Collects tags, aria-labels, captions and the visible text; checks that tags balance."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.labels: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [] if tag in self.VOID else [tag]
        self.labels += [v for k, v in attrs if k == "aria-label"]
        self.links += [v for k, v in attrs if k in ("src", "href", "xlink:href")]
        assert not [k for k, _ in attrs if k.startswith("on")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def run(folder, stage: str, summary: dict | None = None, **metrics) -> Run:
    made = Run.create(folder / stage, stage=stage, model="tiny", settings={})
    for step in range(5):
        made.log(step, **{name: value * (step + 1) for name, value in metrics.items()})
    made.finish(**(summary or {}))
    return made


@pytest.fixture
def ppo(tmp_path) -> Run:
    names = ("reward", "gold_reward", "kl", "kl_k3", "entropy", "clipfrac")
    more = ("vf_clipfrac", "explained_variance", "response_length", "kl_coef")
    parts = {"gold/mood": 0.1, "gold/ends": 0.2}
    made = run(tmp_path, "ppo", **{name: 0.5 for name in names + more}, **parts)
    costs = Ledger()
    for rank in (0, 1):
        costs.add(
            stage="ppo",
            role="policy",
            phase="rollout",
            quantity="seconds",
            value=4,
            source="measured",
            rank=rank,
        )
    costs.add(stage="ppo", phase="rollout", quantity="seconds", value=99, source="predicted")
    made.save_ledger(costs)
    return made


def write(tmp_path, runs, **more) -> tuple[str, Page]:
    path = write_report(tmp_path / "out" / "report.html", runs, **{"title": "Report", **more})
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_every_ppo_picture_is_there_with_a_sentence(tmp_path, ppo):
    _, page = write(tmp_path, {"PPO": ppo})
    titles = [label.split(".")[0] for label in page.labels]
    assert titles == [
        *("proxy reward", "gold reward", "KL to the reference", "KL coefficient", "entropy"),
        *("clipping", "explained variance", "response length", "gold reward by part"),
        "time by phase",
    ]
    assert page.tags.count("figcaption") == page.tags.count("svg") == 10
    assert "kl: last 2.5; kl_k3: last 2.5" in page.labels[2]
    assert "mood: last 0.5; ends: last 1" in page.labels[8]
    assert page.labels[9] == "time by phase. rollout: 4 s"  # measured, averaged over two ranks


def test_metrics_that_are_missing_are_left_out(tmp_path):
    few = run(tmp_path, "dpo", loss=0.1, margin=0.2, kl=float("nan"))
    none = run(tmp_path, "sft")
    _, page = write(tmp_path, {"DPO": few, "SFT": none})
    assert [label.split(".")[0] for label in page.labels] == ["loss", "margin"]
    assert "logged nothing" in page.text


def test_the_reward_models_ceiling_is_a_reference_line(tmp_path):
    metrics = {"loss": 0.1, "accuracy": 0.15, "eval_accuracy": 0.14}
    reward = run(tmp_path, "reward", {"accuracy_ceiling": 0.81}, **metrics)
    _, page = write(tmp_path, {"RM": reward})
    assert page.labels[1] == (
        "accuracy. accuracy: last 0.75; eval_accuracy: last 0.7; best possible: 0.81"
    )


def test_the_file_needs_nothing_else_and_runs_nothing(tmp_path, ppo):
    text, page = write(tmp_path, {"PPO": ppo})
    assert "script" not in page.tags and page.links == []
    assert "@import" not in text and "url(" not in text
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 1  # "http-equiv"
    for need in ("prefers-color-scheme: dark", "@media print", 'name="viewport"', "default-src"):
        assert need in text
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["report.html"]


def test_what_models_and_people_write_is_escaped(tmp_path, ppo):
    evil = "<script>alert('x')</script><img src=x onerror=y> & \x00"
    text, page = write(
        tmp_path,
        {evil: ppo},
        title=evil,
        table_rows=[{evil: evil}],
        stories=[{evil: {evil: evil, "PPO": "once\nupon"}}],
    )
    assert "script" not in page.tags and "img" not in page.tags
    assert text.count("&lt;script&gt;") >= 6 and "\x00" not in text
    assert page.text.count("alert('x')") >= 6


def test_stories_stand_side_by_side_in_their_order(tmp_path):
    stories = [{"a fox": {"SFT": "A fox.", "PPO": "A happy fox."}}, {"an owl": {"SFT": "An owl."}}]
    text, page = write(tmp_path, {}, stories=stories, table_rows=[{"stage": "SFT", "time": "13 s"}])
    assert page.text.index("A fox.") < page.text.index("A happy fox.") < page.text.index("An owl.")
    assert text.count('class="story"') == 3 and page.tags.count("h3") == 2
    assert page.text.index("13 s") < page.text.index("What the models write")


def test_what_was_written_in_training_is_there_token_by_token(tmp_path, ppo):
    """Of twenty steps eight, first and last among them, and three of each step's five samples."""
    for step in range(20):
        for number in range(5):
            text = [f"s{step}", f" n{number}", " <b>"]
            tokens = {"text": text, "log_ratio": [0.0, 0.5, -0.25 * step]}
            written = {"prompt": f"say {step}", "response": "".join(text), "tokens": tokens}
            ppo.sample(step, [written])
    page_text, page = write(tmp_path, {"PPO": ppo})
    shown = [0, 3, 5, 8, 11, 14, 16, 19]
    assert page.tags.count("details") == page.tags.count("summary") == len(shown)
    assert page_text.count("<details open>") == 1
    for step in range(20):
        assert (f"Step {step}say" in page.text.split("8 of 20 steps")[1]) == (step in shown)
    assert page_text.count("s19</span>") == 3 and "n3" not in page.text
    assert "<b> n" not in page_text and page_text.count("&lt;b&gt;</span>") == 3 * len(shown)
    assert 'data-tip="3/3 “ &lt;b&gt;” · log' in page_text  # read by pointing at it
    assert 'class="t m' in page_text and 'class="t p' in page_text  # coloured by its figure
    assert "script" not in page.tags


def test_a_run_without_figures_of_its_tokens_has_its_texts(tmp_path):
    made = run(tmp_path, "sft", loss=0.1)
    assert "What it wrote in training" not in write(tmp_path, {"SFT": made})[1].text
    made.sample(3, [{"prompt": "say", "response": "a fox"}])
    _, page = write(tmp_path, {"SFT": made})
    assert "1 of 1 step, up" in page.text and "Step 3" in page.text and "fox" in page.text
