#!/usr/bin/env bash
# Train on this machine, one rank per GPU, or 2 CPU ranks without GPUs. Arguments go to train.py (--help lists them).
#   bash launch/single_node.sh --norm syncbn --epochs 3
#   NPROC=8 bash launch/single_node.sh --data cifar10 --amp --channels-last
#   MAX_RESTARTS=3 bash launch/single_node.sh --checkpoint out/run
# Variables, all optional: NPROC (ranks), PYTHON (interpreter), OMP_NUM_THREADS (per rank), MAX_RESTARTS (how often the
# ranks are started anew after one has died: from the last checkpoint, or from the beginning without --checkpoint).
set -euo pipefail
me=single_node.sh cpu_ranks=2
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
exec "$PYTHON" "$root/launch/torchrun.py" --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    "$root/launch/train.py" "$@"
