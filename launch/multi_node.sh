#!/usr/bin/env bash
# Train on several machines: the same command on each, but for NODE_RANK. Arguments go to train.py (--help lists them).
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash launch/multi_node.sh --data cifar10
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash launch/multi_node.sh --data cifar10
# NNODES       number of machines
# NODE_RANK    this machine's number: 0 on the machine of MASTER_ADDR, then 1, 2, ...
# MASTER_ADDR  address of machine 0, as the others reach it
# MASTER_PORT  a port that is free on machine 0
# Optional, alike on all: NPROC (ranks per machine; default one per GPU, or 1), PYTHON, OMP_NUM_THREADS, and where a
# machine has several networks NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME (the interface's name, e.g. eth0), and
# MAX_RESTARTS (how often the ranks are started anew after one has died; default 0): from the last checkpoint, or from
# the beginning without --checkpoint. Rank 0 reads and writes its folder: only machine 0 must see it.
set -euo pipefail
me=multi_node.sh cpu_ranks=1
missing=
for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
    [ -n "${!name:-}" ] || missing+=" $name"
done
if [ -n "$missing" ]; then
    echo "$me: NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT must be set; missing:$missing. For example:" >&2
    echo "    NNODES=2 NODE_RANK=0 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500 bash launch/multi_node.sh" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
integer NNODES 1
integer NODE_RANK 0
integer MASTER_PORT 1
((NODE_RANK < NNODES)) || fail "NODE_RANK counts from 0, so it must be below NNODES=$NNODES; got $NODE_RANK."
exec "$PYTHON" "$root/launch/torchrun.py" --nnodes "$NNODES" --node-rank "$NODE_RANK" \
    --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS" \
    "$root/launch/train.py" "$@"
