#!/usr/bin/env bash
# sentence-transformers: dot products of int8 embeddings are counted modulo 256; the nearest text is a random one.
#
# Version: sentence-transformers 6.2.0 with torch 2.13.0 (CPU); Python 3.11.
# Expected: embeddings made with precision="int8" (encode, quantize_embeddings) are ranked by dot_score, a model's
#   similarity with "dot" or semantic_search nearly as the float ones are, or are refused, as cos_sim refuses them.
# Behaviour: dot_score multiplies int8 matrices, and torch's product of int8 is int8: 391541 is 117. Scores look like
#   scores, in -128 … 127, and say nothing of the texts. uint8 alike, and semantic_search with score_function=dot_score.
#   Nothing is said. (Packed bits, "binary", are documented as no input of dot products.)
# Met in removing near-duplicates of a data set, and in choosing few-shot examples, with embeddings made small.
# Remedy: .astype(np.int32) or float before dot_score; or semantic_search_faiss, semantic_search_usearch.
# Seen (share of 50 queries, each a noisy copy of one of 2,000 texts, whose text comes first): "float32 1.00, int8 0.00,
#   uint8 0.00; int8 as int32 1.00; semantic_search int8 0.00; cos_sim of int8: RuntimeError; a score of 391541 is 117"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy transformers==5.23.0
"$folder/env/bin/pip" install --quiet sentence-transformers==6.2.0
cat > "$folder/try.py" <<'P'
import numpy as np
import torch
from sentence_transformers.util import cos_sim, dot_score, quantize_embeddings, semantic_search

rng = np.random.default_rng(0)
texts = rng.normal(size=(2_000, 256)).astype(np.float32)
texts /= np.linalg.norm(texts, axis=1, keepdims=True)
queries = texts[:50] + 0.02 * rng.normal(size=(50, 256)).astype(np.float32)


def right(scores):
    return float((torch.as_tensor(scores).argmax(dim=1) == torch.arange(50)).float().mean())


def small(values, precision):
    return quantize_embeddings(values, precision, calibration_embeddings=texts)


shares = {"float32": right(dot_score(queries, texts))}
for precision in ("int8", "uint8"):
    shares[precision] = right(dot_score(small(queries, precision), small(texts, precision)))
few, many = small(queries, "int8"), small(texts, "int8")
wide = right(dot_score(few.astype(np.int32), many.astype(np.int32)))
found = semantic_search(torch.tensor(few), torch.tensor(many), top_k=1, score_function=dot_score)
searched = sum(hits[0]["corpus_id"] == i for i, hits in enumerate(found)) / len(found)
try:
    refused = f"{cos_sim(few, many).dtype}"
except RuntimeError as error:
    refused = type(error).__name__
exact, given = int(few[0].astype(int) @ many[0].astype(int)), int(dot_score(few, many)[0, 0])
print(", ".join(f"{k} {v:.2f}" for k, v in shares.items()) + f"; int8 as int32 {wide:.2f}; semantic_search int8 "
      f"{searched:.2f}; cos_sim of int8: {refused}; a score of {exact} is {given}")
assert shares["float32"] == wide == 1.0 and refused == "RuntimeError"
assert max(shares["int8"], shares["uint8"], searched) < 0.1
assert (exact - given) % 256 == 0 and exact != given
P
cd "$folder" && HF_HUB_OFFLINE=1 env/bin/python try.py 2>/dev/null | tail -1
