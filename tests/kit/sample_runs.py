"""Runs with samples, written by hand, and HTML read back as a reader sees it."""

from html.parser import HTMLParser

from rlhf_lab.runs.run import Run

EVIL = [
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked=1">',
    "'; --> ]]> &lt;b&gt; <!-- </div></section>",
    "\u202eright to left\u2066 \x00\x1b[31m\r \u200b\ufeff \U000e0041",
    "two\nlines\n\n\ttab",
    "a" * 3000,
    "\ud800 lonely",
]


def record(**figures):
    return {"text": ["A", " fox", " ran", ".", "<end>"], "special": [4], **figures}


FIGURES = {
    "log_ratio": [0.0, 1.0, -2.0, 0.5, 0.1],
    "logprob": [-1.0, -2.0, -3.0, -0.5, -0.1],
    "value": [1.0, 1.5, 2.0, 2.5, 3.0],
    "advantage": [0.0, 1.0, -1.0, 0.5, -0.5],
    "reward": [0.0, -0.1, 0.2, -0.05, 2.0],
    "return": [2.0, 2.0, 2.1, 1.9, 2.0],
}


def make(
    folder, stage="ppo", steps=(1, 2, 3), tokens=True, before="sft", evaluated=(), prompts=("p",)
):
    run = Run.create(folder, stage=stage, model="tiny", settings={})
    for prompt in prompts:
        run.sample(0, [{"prompt": prompt, "response": f"before {prompt}", "when": before}])
    for step in steps:
        more = {"tokens": record(**FIGURES)} if tokens else {}
        run.sample(
            step,
            [
                {
                    "prompt": f"{name} at {step}",
                    "response": "A fox ran.",
                    "reward": step + 0.5,
                    "gold_reward": 0.25,
                    "gold/mood": 1.0,
                    **more,
                }
                for name in ("first", "second")
            ],
        )
        if step in evaluated:
            run.sample(
                step,
                [
                    {"prompt": p, "response": f"at {step} {p}", "reward": 1.0, "when": "held-out"}
                    for p in prompts
                ],
            )
    for prompt in prompts:
        run.sample(0, [{"prompt": prompt, "response": f"after {prompt}", "when": stage}])
    run.finish()
    return run


class Read(HTMLParser):
    """Text as a reader sees it, with unseen characters turned back, and every tag there is."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.attributes, self._code = "", set(), set(), False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}
        self._code = ("class", "un") in attributes

    def handle_endtag(self, tag):
        self._code = False

    def handle_data(self, data):
        self.text += chr(int(data.removeprefix("U+"), 16)) if self._code else data

    def handle_comment(self, data):
        raise AssertionError(f"a comment: {data!r}")

    handle_decl = handle_pi = unknown_decl = handle_comment


OURS = {"div", "section", "h4", "span", "i", "b", "mark", "br"}
HARMLESS = {"class", "data-tip", "dir", "tabindex", "role", "style", "scope"}
HARMLESS |= {"aria-label", "aria-live", "aria-hidden"}
