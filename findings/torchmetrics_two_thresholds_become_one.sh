#!/usr/bin/env bash
# torchmetrics.MetricCollection: metrics that agree on the first batch are one metric from then on.
#
# Version: torchmetrics 1.9.0, torch 2.13.0 (CPU); Python 3.11 (Lightning-AI/torchmetrics#2596, closed).
# Expected: a collection gives what its metrics give one by one. "Compute groups", which save work, are described as
#   metrics that differ in their last step alone (precision and recall of the same counts), not in settings such as
#   `threshold`.
# Behaviour: after the first update, metrics whose counts are equal by then are put into one group, whatever their
#   settings are; only the first of them (by name) is updated any more, and the others report its counts. Two
#   thresholds that agree on a first batch of clear cases agree for ever. "Equal" is torch.allclose: among 400,000
#   tokens counts that differ by one are equal as well. Nothing is said, and the order of the batches decides the figure.
# Met with accuracy at several thresholds or margins of a reward model, and with filters of one's own.
# Remedy: compute_groups=False.
# Seen: "shares of 0.67 and 0.33: as a collection 0.33 0.33, one by one 0.67 0.33, batches in the other order 0.67 0.33,
#   with the remedy 0.67 0.33; a first batch of 400,000 in which one differs, then 400,000: 0.25 0.25, one by one 0.75
#   0.25"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy torchmetrics==1.9.0
cat > "$folder/try.py" <<'P'
import torch
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAccuracy

THRESHOLDS = {"low": 0.5, "high": 0.9}
clear = torch.tensor([0.95, 0.05]), torch.tensor([1, 0])  # right at both thresholds
unclear = torch.tensor([0.6, 0.6, 0.4, 0.4]), torch.tensor([1, 1, 1, 1])  # two right at .5, none at .9


def metrics():
    return {name: BinaryAccuracy(threshold=value) for name, value in THRESHOLDS.items()}


def together(batches, **settings):
    collection = MetricCollection(metrics(), **settings)
    for batch in batches:
        collection.update(*batch)
    figures = collection.compute()
    return [float(figures[name]) for name in THRESHOLDS]


def one_by_one(batches):
    each = metrics()
    for metric in each.values():
        for batch in batches:
            metric.update(*batch)
    return [float(metric.compute()) for metric in each.values()]


def text(values):
    return " ".join(f"{v:.2f}" for v in values)


few = [clear, unclear]
merged, apart = together(few), one_by_one(few)
other_order, mended = together(few[::-1]), together(few, compute_groups=False)
size = 400_000
target = torch.ones(size, dtype=torch.long)
nearly = torch.cat([torch.full((size // 2,), 0.95), torch.full((size // 2,), 0.05)])
nearly[0] = 0.6  # the one that the thresholds tell apart
many = [(nearly, target), (torch.full((size,), 0.6), target)]
large, large_apart = together(many), one_by_one(many)
print(f"shares of {apart[0]:.2f} and {apart[1]:.2f}: as a collection {text(merged)}, one by one {text(apart)}, batches in "
      f"the other order {text(other_order)}, with the remedy {text(mended)}; a first batch of {size:,} in which one "
      f"differs, then {size:,}: {text(large)}, one by one {text(large_apart)}")
assert apart == other_order == mended and apart[0] != apart[1]
assert merged == [apart[1]] * 2
assert large == [large_apart[1]] * 2 and abs(large[0] - large_apart[0]) > 0.4
P
"$folder/env/bin/python" "$folder/try.py" 2>/dev/null
