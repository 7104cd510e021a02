#!/usr/bin/env bash
# NF4 on a CPU: a matrix whose rows are no whole number of blocks is decoded wrongly, without a word.
#
# Version: bitsandbytes 0.50.2, torch 2.13.0, CPU.
# Expected: dequantize_4bit gives the matrix back as well for rows of 96 values as for rows of 128:
#   NF4 errs by about 9 % of the weights' size, whatever the shape.
# Behaviour: blocks of 64 values are cut from the matrix read as one row, so with rows of 96 every
#   second block lies in two rows. quantize_4bit stores that rightly. dequantize_4bit of the matrix
#   takes another block's scale for a part of the values; the same bytes and scales, given as one
#   long column, are decoded rightly. Rows of 64 and 128 are right both ways.
# Met by: models whose width is even and no multiple of 64, in every bnb.nn.Linear4bit on a CPU.
# Seen (error as a share of the weights' norm; scales of the rows differ tenfold):
#   "128: as a matrix 0.09, as a column 0.09", "96: as a matrix 0.79, as a column 0.09"
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/env/bin/pip" install --quiet bitsandbytes==0.50.2
cat > "$folder/try.py" <<'P'
import copy
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

wrong = {}
for width in (64, 128, 96):
    torch.manual_seed(0)
    matrix = torch.randn(32, width) * torch.logspace(-1, 0, 32).roll(5)[torch.randperm(32), None]
    packed, state = quantize_4bit(matrix, blocksize=64, quant_type="nf4")
    as_matrix = dequantize_4bit(packed, state)
    column = copy.copy(state)
    column.shape = torch.Size([matrix.numel()])
    as_column = dequantize_4bit(packed.view(-1, 1), column).view_as(matrix)
    errors = [float((m - matrix).norm() / matrix.norm()) for m in (as_matrix, as_column)]
    print(f"{width}: as a matrix {errors[0]:.2f}, as a column {errors[1]:.2f}")
    wrong[width] = errors
assert all(e < 0.12 for width in (64, 128) for e in wrong[width])
assert wrong[96][1] < 0.12 < 0.3 < wrong[96][0], wrong[96]
P
"$folder/env/bin/python" "$folder/try.py"
