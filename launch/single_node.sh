#!/usr/bin/env bash
# Train on this machine, one rank per GPU, or 2 CPU ranks without GPUs. Arguments go to train.py (--help lists them).
#   bash launch/single_node.sh --norm syncbn --epochs 3
#   NPROC=8 bash launch/single_node.sh --data cifar10 --amp --channels-last
# Variables, all optional: NPROC (ranks), PYTHON (interpreter), OMP_NUM_THREADS (per rank).
set -euo pipefail
me=single_node.sh cpu_ranks=2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$PYTHON" "$root/launch/torchrun.py" --standalone --nproc-per-node "$NPROC" "$root/launch/train.py" "$@"
