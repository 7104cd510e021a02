"""How a base model is made: its tokenizer, its shape, and what it reads until it learns no more.

Only `build.py` reads it. Every size is trained by one rule: it reads until the loss on held-out
documents stops falling (`STILL`), then while the learning rate falls to 0. What is found early and
with many documents is not found again by a larger model: it grows from a smaller one (`GROWN`).
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pretraining_text
import torch
from growing import grow
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_lab.world import corpus

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Size:
    """The shape of one size. Heads are 32 wide, which every engine's attention takes; widths are
    whole blocks of NF4 (64 values) and, but for mini's own width, of int4 (groups of 128)."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int

    @property
    def learning_rates(self) -> tuple[float, float]:
        """Of the matrices and of the rest. A Muon step, scaled to the size of AdamW's, has a
        spectral norm that grows with √width, and AdamW's for a head that is the embedding too grows
        with the width: both are held where they are at tiny's width (Yang et al., 2310.17813)."""
        return 3e-3 * (128 / self.width) ** 0.5, 4e-3 * 128 / self.width


SIZES = {
    "mini": Size(64, 2, 2, 2, 128),
    "tiny": Size(128, 3, 4, 4, 128),
    "small": Size(256, 4, 8, 4, 256),
}
GROWN = {"small": "tiny"}
"""The size that another one begins as (`growing.py`); the phases before the last are behind it."""
VOCABULARY, CONTEXT = 1024, 1024
SPECIAL = ["<|pad|>", pretraining_text.END, "<|user|>", "<|assistant|>", "<|system|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}"
    + pretraining_text.END
    + "{% else %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

BATCH = 32
"""documents"""
CHUNK = 500
"""Steps between two looks at the held-out loss; after each one the state is kept."""
STILL = {"chunks": 4, "fall": 0.005}
"""The loss stops falling where the last so many chunks lowered its best by less than this share."""
MOST_CHUNKS = 32
COOLING = 1.0
"""Steps in which the learning rate falls to 0 at the end, as a share of those before."""
LEAST_COOLING = 0.5
"""The least of them, as a share of the most chunks that the last phase may take."""
MATRICES: dict[str, Any] = {"weight_decay": 0.05, "adjust_lr_fn": "match_rms_adamw"}
"""Muon, for the matrices of the layers: with the same 160,000 documents tiny came to a held-out
loss of .621 where AdamW for all weights came to .653."""
THE_REST: dict[str, Any] = {"weight_decay": 0.0, "betas": (0.9, 0.98)}
"""AdamW, for the embeddings and the norms."""
WARMUP = 50
CLIP = 1.0
PHASES: dict[str, dict[str, Any]] = {
    # What is hard to find comes first and alone. That a word came before is found within 200
    # steps of a memory game; that the heading can be copied, where every story keeps to it; that
    # a story departs from it, much sooner in two sentences than in seven. It then carries over.
    # Mood and sense, which need whole stories and many readers, come last and take longest.
    "faithful": {"chunks": 2, "documents": {"games": 0.5, "sketches": 0.25, "faithful": True}},
    "sketches": {"chunks": 4, "documents": {"games": 0.1, "sketches": 0.75, "misfiled": 0.5}},
    "stories": {"chunks": None, "documents": {"games": 0.05, "sketches": 0.1}},
}
"""`documents`: what is read (`pretraining_text.web_text`); `chunks`: how long, None until the loss
stops falling and then while the learning rate cools down."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on the world's text and a list of common English words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = (HERE / "words.txt").read_text().split()
    documents = pretraining_text.web_text("train", 4000, seed=1, games=0.05, misfiled=0.5)
    text = [
        "\n".join(piece.removesuffix(pretraining_text.END) for piece, _ in d) for d in documents
    ]
    text += [f"{w} {w} {w.capitalize()}" for w in words for _ in range(3)]
    text += [r.prompt for r, _ in zip(corpus.requests("train", 2), range(2000), strict=False)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        additional_special_tokens=SPECIAL[2:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        padding_side="left",
    )


def new_model(name: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama-style model with tied embeddings and random weights."""
    size = SIZES[name]
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            intermediate_size=size.mlp,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            # About 1/√width: with the usual 0.02 a model this narrow takes ten times as long to
            # find out that a later word can be copied from an earlier one.
            initializer_range=round(0.8 / size.width**0.5, 3),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=None,
        )
    )


# ------------------------------------------------------------------------------- what it reads

Batch = tuple[torch.Tensor, torch.Tensor]
"""Token ids, padded on the right, and which of them are learned: (b, t) each."""


class Reader:
    """Documents as batches of token ids. `stories`: digests of those to train on, so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.pad, self.stories = tokenizer.pad_token_id, set[bytes]()
        self.ids_of = lru_cache(100_000)(lambda text: tokenizer(text)["input_ids"])

    def batches(
        self, split: str, batches: int, seed: int, documents: dict[str, Any]
    ) -> Iterator[Batch]:
        """Batches of documents of like length, in a random order. The seed decides everything."""
        rows = []
        for document in pretraining_text.web_text(split, BATCH * batches, seed, **documents):
            ids, learned = [], []
            if split == "train":
                self.stories.add(pretraining_text.digest(document[1][0]))
            for text, is_learned in document:
                ids += self.ids_of(text)
                learned += [is_learned] * (len(ids) - len(learned))
            rows.append((torch.tensor(ids), torch.tensor(learned)))
        # Like lengths among the documents of ten batches: little is padded, and no batch holds
        # only games or only stories.
        groups = [rows[i : i + 10 * BATCH] for i in range(0, len(rows), 10 * BATCH)]
        rows = [row for group in groups for row in sorted(group, key=lambda row: len(row[0]))]
        starts = list(range(0, len(rows), BATCH))
        random.Random(f"batches:{seed}").shuffle(starts)
        for start in starts:
            ids_of_rows, learned_of_rows = zip(*rows[start : start + BATCH], strict=True)
            yield (
                pad_sequence(ids_of_rows, batch_first=True, padding_value=self.pad),
                pad_sequence(learned_of_rows, batch_first=True, padding_value=False),
            )


def summed_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, int]:
    """Cross entropy summed over the learned tokens, in nats, and how many they are.

    Padding is on the right, where no earlier token sees it: there is no mask to make.
    """
    ids, learned = batch
    hidden = model.model(ids[:, :-1], use_cache=False).last_hidden_state
    mask = learned[:, 1:]
    logits = model.lm_head(hidden[mask]).float()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][mask], reduction="sum"), len(logits)


@torch.no_grad()
def mean_loss(model: LlamaForCausalLM, batches: list[Batch]) -> float:
    """Nats per learned token."""
    sums = [summed_loss(model.eval(), batch) for batch in batches]
    return sum(float(loss) for loss, _ in sums) / sum(count for _, count in sums)


# ------------------------------------------------------------------------------------ training


@dataclass
class Place:
    """How far pretraining is. `losses`: held-out loss after each chunk of the phase."""

    phase: str = next(iter(PHASES))
    losses: tuple[float, ...] = ()
    cooling: int = 0
    """chunks of cooling down in all; 0 before it begins"""
    cooled: int = 0
    chunks: int = 0
    """done, over all phases"""
    tokens: int = 0
    """read, padding aside"""
    seconds: float = 0.0

    @property
    def done(self) -> bool:
        return bool(self.cooling) and self.cooled == self.cooling


def stopped_falling(losses: tuple[float, ...]) -> bool:
    """Whether the last chunks lowered the best loss by less than `STILL` says."""
    late = STILL["chunks"]
    if len(losses) <= late:
        return False
    return min(losses[-late:]) > (1 - STILL["fall"]) * min(losses[:-late])


class Pretraining:
    """One base model in the making. `folder` keeps its state: what was killed goes on from there,
    to the same weights."""

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        seed: int,
        folder: Path,
        smaller: LlamaForCausalLM | None = None,
    ):
        """`smaller`: what a size of `GROWN` begins as."""
        self.name, self.seed, self.file = name, seed, folder / f"{name}-{seed}.pt"
        self.model, self.reader = new_model(name, tokenizer, seed), Reader(tokenizer)
        self.optimizers = optimizers(self.model)
        self.place = Place()
        if smaller is not None:
            grow(self.model, smaller)
            self.place.phase = list(PHASES)[-1]
        self._recipe = recipe(name) | {"tokenizer": tokenizer.backend_tokenizer.to_str()}
        self._held_out: dict[str, list[Batch]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.file.is_file():
            self._resume(torch.load(self.file, weights_only=True))

    def _resume(self, state: dict[str, Any]) -> None:
        """From what was kept; anew where that was made by another recipe."""
        if state.get("recipe") != self._recipe:
            print(f"{self.file} was made by another recipe: {self.name} starts anew", flush=True)
            _stories_file(self.file).unlink(missing_ok=True)
            return
        self.model.load_state_dict(state["model"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.place = Place(**state["place"])

    def run(self, most_chunks: int = MOST_CHUNKS) -> None:
        """To the end. `most_chunks` of the last phase, for a trial."""
        while not self.place.done:
            self._chunk()
            line = self._line(most_chunks)
            self._go_on(most_chunks)
            self._keep()
            print(line, flush=True)

    def losses(self) -> dict[str, float]:
        """Nats per token on held-out documents of the last phase, and on documents trained on."""
        last = self.place.phase
        documents = PHASES[last]["documents"]
        trained = list(self.reader.batches("train", CHUNK, self._seed_of(0), documents))[:16]
        return {
            "held-out loss, nats per token": mean_loss(self.model, self._held_out_of(last)),
            "trained loss, nats per token": mean_loss(self.model, trained),
        }

    def _chunk(self) -> None:
        start, phase = time.monotonic(), self.place.phase
        seed = self._seed_of(self.place.chunks)
        self.model.train()
        self.reader.stories.clear()
        for step, batch in enumerate(
            self.reader.batches("train", CHUNK, seed, PHASES[phase]["documents"])
        ):
            loss, count = summed_loss(self.model, batch)
            (loss / count).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
            rates = SIZES[self.name].learning_rates
            for optimizer, rate in zip(self.optimizers, rates, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = rate * self._share_of_rate(step)
                optimizer.step()
                optimizer.zero_grad()
            self.place.tokens += int((batch[0] != self.reader.pad).sum())
        self.place.chunks += 1
        self.place.cooled += bool(self.place.cooling)
        self.place.losses += (mean_loss(self.model, self._held_out_of(phase)),)
        self.place.seconds += time.monotonic() - start

    def _share_of_rate(self, step: int) -> float:
        """Of the learning rate: up in `WARMUP` steps, then constant, then down to 0."""
        if not self.place.cooling:
            return min(1.0, (CHUNK * self.place.chunks + step + 1) / WARMUP)
        return 1 - (CHUNK * self.place.cooled + step) / (CHUNK * self.place.cooling)

    def _go_on(self, most_chunks: int) -> None:
        """What follows the chunk that is done: another one, another phase, or cooling down."""
        place = self.place
        if place.cooling:
            return
        planned = PHASES[place.phase]["chunks"]
        if planned is None:
            if stopped_falling(place.losses) or len(place.losses) >= most_chunks:
                least = round(LEAST_COOLING * most_chunks)
                place.cooling = max(1, least, round(COOLING * place.chunks))
        elif len(place.losses) >= min(planned, most_chunks):
            names = list(PHASES)
            place.phase, place.losses = names[names.index(place.phase) + 1], ()

    def _keep(self) -> None:
        """The state on disk, whole at any moment."""
        new = self.file.with_suffix(".new")
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": asdict(self.place),
            "recipe": self._recipe,
        }
        torch.save(state, new)
        with _stories_file(self.file).open("ab") as file:  # twice, if it is killed now: a set
            file.write(b"".join(sorted(self.reader.stories)))
        os.replace(new, self.file)

    def _seed_of(self, chunk: int) -> int:
        return 1000 * self.seed + chunk

    def _held_out_of(self, phase: str) -> list[Batch]:
        """The same documents for every size and seed."""
        if phase not in self._held_out:
            documents = PHASES[phase]["documents"]
            self._held_out[phase] = list(self.reader.batches("validation", 16, 0, documents))
        return self._held_out[phase]

    def _line(self, most_chunks: int) -> str:
        place = self.place
        what = f"cooling {place.cooled}/{place.cooling}" if place.cooling else place.phase
        before = 0 if self.name in GROWN else sum(p["chunks"] or 0 for p in PHASES.values())
        ahead = before + most_chunks
        most = place.cooling - place.cooled if place.cooling else ahead - place.chunks
        if not place.cooling:
            most += round(COOLING * ahead)
        left = most * place.seconds / place.chunks / 60
        return (
            f"{self.name} base  step {CHUNK * place.chunks}  {what}  "
            f"held-out loss {place.losses[-1]:.4f}  "
            f"{place.tokens / 1e6:.1f}M tokens  {place.seconds / 60:.1f} min  "
            f"ETA {'' if place.cooling else 'at most '}{left:.0f} min"
        )

    @property
    def description(self) -> str:
        """The recipe in a sentence, for the card."""
        size, place = SIZES[self.name], self.place
        still = (
            f"{STILL['chunks']} chunks lowered the held-out loss by less than {STILL['fall']:.1%}"
        )
        phases: dict[str, dict[str, Any]] = {place.phase: PHASES[place.phase]}
        grown = ""
        if self.name in GROWN:
            grown = (
                f"Begins as the base model of {GROWN[self.name]}, and computes the same at first. "
            )
        else:
            phases = PHASES
        return (
            f"{grown}Pretrained on headed stories and comments on them, {BATCH} documents a batch, "
            f"in chunks of {CHUNK} steps: {phases}; the last phase until {still}, then "
            f"{place.cooling} chunks in which the learning rate falls to 0; "
            f"{CHUNK * place.chunks} steps in all. Muon for the matrices of the layers, "
            f"{MATRICES}; AdamW for the rest, {THE_REST}; learning rates "
            f"{size.learning_rates[0]:.3g} and {size.learning_rates[1]:.3g}, {WARMUP} steps of "
            f"warm-up, gradients clipped at {CLIP}. {size}."
        )


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the rest."""
    inner = {id(weight) for weight in model.model.layers.parameters() if weight.ndim == 2}
    weights = list(model.parameters())
    return [
        torch.optim.Muon([w for w in weights if id(w) in inner], **MATRICES),
        torch.optim.AdamW([w for w in weights if id(w) not in inner], **THE_REST),
    ]


def recipe(name: str) -> dict[str, Any]:
    """What decides a base model, seed and tokenizer aside. Plain values, which a file can hold."""
    return {
        "size": asdict(SIZES[name]),
        "phases": PHASES,
        "batch": BATCH,
        "chunk": CHUNK,
        "still": STILL,
        "cooling": COOLING,
        "learning rates": SIZES[name].learning_rates,
        "matrices": MATRICES,
        "the rest": THE_REST,
        "warm-up": WARMUP,
        "clip": CLIP,
        "least cooling": LEAST_COOLING,
    }


def _stories_file(state: Path) -> Path:
    return state.with_suffix(".stories")


def read_stories(folder: Path, name: str, seed: int) -> set[bytes]:
    """Digests of the stories that a base model has read."""
    digests = _stories_file(folder / f"{name}-{seed}.pt").read_bytes()
    size = pretraining_text.DIGEST
    return {digests[i : i + size] for i in range(0, len(digests), size)}
