#!/usr/bin/env bash
# ATEN_CPU_CAPABILITY alone breaks bfloat16 attention on a CPU with AMX.
#
# Version: torch 2.13.0, CPU build; a CPU with AMX, Intel's of 2023 and later (elsewhere the
#   script says so and passes: with AVX-512 alone, on an AMD EPYC, all three work).
# Expected: ATEN_CPU_CAPABILITY=avx2 (or default) makes torch choose its plainer kernels, so that
#   what other CPUs compute can be tried here: everything works, slower.
# Behaviour: scaled_dot_product_attention in bfloat16 works for 8 tokens and raises RuntimeError
#   ("pack_vnni2 is only supported when avx512 is supported") for 200: for longer rows the kernel
#   packs for oneDNN's bfloat16 product, which looks at the CPU (for AMX) and not at this variable.
# Remedy: lower oneDNN with it: ONEDNN_MAX_CPU_ISA=AVX2 (SSE41 beside "default"). Its value DEFAULT
#   means no limit.
# Seen: "alone 8 works", "alone 200 RuntimeError", "both 200 works".
set -euo pipefail
if ! grep -qw amx_bf16 /proc/cpuinfo; then
  echo "no AMX here: nothing to see"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet torch==2.13.0 numpy
cat > "$folder/try.py" <<'P'
import sys
import torch
row = torch.randn(2, 2, int(sys.argv[1]), 16, dtype=torch.bfloat16)
try:
    torch.nn.functional.scaled_dot_product_attention(row, row, row, is_causal=True)
    print("works")
except RuntimeError as error:
    print(type(error).__name__)
P
try() { "$folder/env/bin/python" "$folder/try.py" "$1"; }
export ATEN_CPU_CAPABILITY=avx2
short=$(try 8); long=$(try 200)
both=$(ONEDNN_MAX_CPU_ISA=AVX2 try 200)
echo "alone 8 $short"; echo "alone 200 $long"; echo "both 200 $both"
[ "$short $long $both" = "works RuntimeError works" ]
