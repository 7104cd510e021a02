"""What a draft model and another attention change: `python benchmarks/drafts.py`.

On the bundled models and held-out prompts, in one process on one core. Speed is a ratio of seconds
in the same round, what is compared in turn; medians over rounds.

accepted    by enumeration, token by token along the model's own texts: share of positions where the
            draft's likeliest token is the model's (greedy), mean of the sum over the vocabulary of
            min(p, q) (sampling; Leviathan et al. 2023, 2211.17192, theorem 3.5)
drafts      transformers' assisted decoding of `small` by `mini` and `tiny`, k tokens guessed at a
            time: tokens a pass of the model brought, against 1 + a + … + a^k; seconds and FLOPs
            with the draft over those without, measured and planned; whether greedy texts are equal
attention   `generate` with eager over sdpa, and continuous batching with paged caches (eager, sdpa)
            over `generate`, 16 rows; whether greedy texts are equal

A text is equal, or first differs where the two best logits lie within 1e-4 (a tie).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "drafts.json"
sys.path.insert(0, str(ROOT))

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import ContinuousBatchingConfig  # noqa: E402

import rlhf_lab as lab  # noqa: E402
from rlhf_lab.cost.serving import tokens_per_pass  # noqa: E402

TOKENS = 40
"""of a response; none ends earlier, so that all runs do the same"""
GUESSES = 1, 2, 4, 8
GREEDY, SAMPLED = {"do_sample": False}, {"do_sample": True, "top_k": 0}
SIZES = {"num_blocks": 128, "page_size": 16, "max_batch_tokens": 512, "use_cuda_graph": False}


def loaded(name: str, attention: str = "sdpa"):
    model = lab.load(name).sft
    model.set_attn_implementation(attention)
    model.generation_config.update(eos_token_id=None, max_new_tokens=TOKENS)
    return model


def with_guesses(draft, k: int):
    """transformers' settings for k guesses each time, however sure the draft is."""
    how = {"num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.0}
    draft.generation_config.update(num_assistant_tokens=k, **how)
    return draft


def logits_after(model, text, prompt: int):
    return model(text).logits[0, prompt - 1 : -1]


def equal_or_tied(model, told, made) -> str:
    unlike = (told[0] != made[0]).nonzero()
    if not len(unlike):
        return "equal"
    best = model(told[:, : unlike[0, 0]]).logits[0, -1].topk(2).values
    return "tied" if best[0] - best[1] < 1e-4 else "other"


def accepted(model, draft, prompts) -> dict[str, float]:
    """The share of a draft's tokens that the model keeps, along texts of the model's own."""
    shares: dict[str, list[float]] = {"greedy": [], "sampled": []}
    for ids in prompts:
        for name, how in (("greedy", GREEDY), ("sampled", SAMPLED)):
            text = model.generate(ids, **how)
            p, q = (logits_after(m, text, ids.shape[1]) for m in (model, draft))
            if name == "greedy":
                kept = (p.argmax(-1) == q.argmax(-1)).float()
            else:
                kept = torch.minimum(p.softmax(-1), q.softmax(-1)).sum(-1)
            shares[name] += kept.tolist()
    return {name: statistics.mean(values) for name, values in shares.items()}


def predicted(ids, **more):
    lengths = {"prompt_length": ids.shape[1], "response_length": TOKENS}
    return lab.plan("inference", "small", per_device_train_batch_size=1, **lengths, **more).estimate


def with_draft(model, name: str, prompts, rounds: int) -> list[dict[str, object]]:
    draft, rows, passes = loaded(name), [], []
    shares = accepted(model, draft, prompts)
    hook = model.model.register_forward_hook(lambda *_: passes.append(1))
    for kind, how in (("greedy", GREEDY), ("sampled", SAMPLED)):
        for k in GUESSES:
            assistant = {"assistant_model": with_guesses(draft, k)}
            brought, ratios, flops, texts = [], [], [], []
            for i, ids in enumerate(prompts[:rounds]):
                seconds = {}
                for use in ("with", "without") if i % 2 else ("without", "with"):
                    torch.manual_seed(i)
                    passes.clear()
                    more, start = assistant if use == "with" else {}, time.perf_counter()
                    out = model.generate(ids, **how, **more)
                    seconds[use] = time.perf_counter() - start, len(passes), out
                ratios.append(seconds["with"][0] / seconds["without"][0])
                brought.append(TOKENS / seconds["with"][1])
                if kind == "greedy":
                    texts.append(equal_or_tied(model, seconds["without"][2], seconds["with"][2]))
            for use in (assistant, {}):
                torch.manual_seed(0)
                with FlopCounterMode(display=False) as counter:
                    model.generate(prompts[0], **how, **use)
                flops.append(counter.get_total_flops())
            a, ids = shares[kind], prompts[0]
            more = {"draft_model": name, "accepted": a, "num_assistant_tokens": k}
            both, alone = predicted(ids, **more), predicted(ids)
            row = {
                "draft": name,
                "decoding": kind,
                "k": k,
                "accepted": a,
                "tokens_per_pass": statistics.mean(brought),
                "tokens_per_pass_planned": tokens_per_pass(both.setup),
                "seconds_ratio": statistics.median(ratios),
                "seconds_ratio_planned": both.step_seconds / alone.step_seconds,
                "flops_ratio_of_one_text": flops[0] / flops[1],
                "flops_ratio_planned": both.flops / alone.flops,
                "texts": {word: texts.count(word) for word in sorted({*texts})},
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    hook.remove()
    return rows


def attention(prompts, rounds: int) -> dict[str, object]:
    models = {name: loaded("small", name) for name in ("sdpa", "eager")}
    batch = prompts[: 16 * (len(prompts) // 16)][:16]
    rows = [ids[0].tolist() for ids in batch]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])

    def generate(name: str):
        out = models[name].generate(ids, attention_mask=mask, **GREEDY)
        return out[:, longest:].tolist()

    def paged(name: str):
        config = models[name].generation_config
        done = models[name].generate_batch(
            rows, config, ContinuousBatchingConfig(**SIZES), warmup=False
        )
        models[name].set_attn_implementation(name)
        return [list(done[key].generated_tokens) for key in sorted(done, key=lambda k: int(k[4:]))]

    ways = {f"generate, {name}": (generate, name) for name in models}
    ways |= {f"paged, {name}": (paged, name) for name in models}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    same: dict[str, int] = dict.fromkeys(ways, 0)
    for i in range(rounds):
        spent, texts = {}, {}
        for way, (run, name) in list(ways.items())[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            texts[way] = run(name)
            spent[way] = time.perf_counter() - start
        for way in ways:
            seconds[way].append(spent[way] / spent["generate, sdpa"])
            first = texts["generate, sdpa"]
            same[way] = sum(a == b for a, b in zip(texts[way], first, strict=True))
    found = {
        way: {"seconds_ratio": statistics.median(seconds[way]), "rows_equal": same[way]}
        for way in ways
    }
    print(json.dumps(found), flush=True)
    return {"rows": len(rows), **found}


def replanned(row: dict[str, object]) -> dict[str, object]:
    """A measured row beside what is planned today."""
    prompt = torch.zeros((1, 16))
    more = {"accepted": row["accepted"], "num_assistant_tokens": row["k"]}
    both, alone = predicted(prompt, draft_model=row["draft"], **more), predicted(prompt)
    return {**row, "seconds_ratio_planned": both.step_seconds / alone.step_seconds}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--rounds", type=int, default=6, help="prompts, each both ways [6]")
    parser.add_argument("--plan", action="store_true", help="plan anew what was measured")
    args = parser.parse_args()
    if args.plan:
        result = json.loads(RESULTS.read_text())
        result["drafts"] = [replanned(row) for row in result["drafts"]]
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        return 0
    rounds = args.rounds
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    tokenizer = lab.load("small").tokenizer
    texts = [row["prompt"] for row in lab.load_data("stories").prompts.test[: max(16, rounds)]]
    prompts = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    torch.manual_seed(0)
    model = loaded("small")
    drafts = [row for name in ("mini", "tiny") for row in with_draft(model, name, prompts, rounds)]
    result = {
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "rounds": rounds,
        "tokens": TOKENS,
        "drafts": drafts,
        "attention": attention(prompts, rounds),
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return int(any("other" in row["texts"] for row in drafts))


if __name__ == "__main__":
    sys.exit(main())
