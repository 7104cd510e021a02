"""Model cards: what a checkpoint is, how it was made, what was measured."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData


def write_card(
    folder: Path,
    title: str,
    recipe: str,
    seed: int,
    figures: dict[str, object],
    library: str = "transformers",
) -> None:
    """`README.md` in the folder of a checkpoint."""
    scores = "reward" in title
    about = ModelCardData(
        language="en",
        license="apache-2.0",
        library_name=library,
        pipeline_tag="text-classification" if scores else "text-generation",
        tags=["rlhf", "trl", *(["reward-trainer"] if scores else [])],
    )
    lines = [
        f"- {name}: {value:.4g}" if isinstance(value, float) else f"- {name}: {value}"
        for name, value in figures.items()
    ]
    text = (
        f"---\n{about.to_yaml()}\n---\n# {title}\n\nMade by `small_models/build.py` (seed {seed}) "
        f"on the bundled world of rlhf_lab, which writes its own text.\n\n{recipe}\n\n"
        "## Measured when it was built\n\n" + "\n".join(lines) + "\n"
    )
    ModelCard(text)  # reads the front matter, and raises where it could not
    (folder / "README.md").write_text(text)
