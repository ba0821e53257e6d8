# Sourced by single_node.sh and multi_node.sh, which set `me` (for messages) and `cpu_ranks` (ranks without GPUs).
# Sets: root, PYTHON (the active environment's, else .venv's, else python3), NPROC (one rank per GPU), OMP_NUM_THREADS,
# MAX_RESTARTS (0).

fail() {
    echo "$me: $1" >&2
    exit 2
}

# integer NAME MINIMUM: the variable NAME holds an integer of at least MINIMUM.
integer() {
    [[ ${!1} =~ ^[0-9]{1,9}$ ]] && ((10#${!1} >= $2)) || fail "$1 must be an integer of at least $2; got '${!1}'."
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" # syncbn needs no installation to be trained with
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
        PYTHON=python
    elif [ -x "$root/.venv/bin/python" ]; then
        PYTHON=$root/.venv/bin/python
    fi
fi
missing=$("$PYTHON" - <<'END'
from importlib.util import find_spec
print(*(name for name in ("torch", "numpy", "sklearn", "tqdm") if find_spec(name) is None), sep=", ")
END
) || fail "PYTHON must be a Python interpreter; got '$PYTHON'. Unset it, or activate an environment."
[ -z "$missing" ] || fail "$PYTHON needs torch, numpy, sklearn and tqdm; it lacks: $missing. \
Run 'bash launch/quickstart.sh' once, which makes .venv with them, or activate an environment that has them."
NPROC=${NPROC:-$("$PYTHON" -c "import torch; print(torch.cuda.device_count() or $cpu_ranks)")}
integer NPROC 1
MAX_RESTARTS=${MAX_RESTARTS:-0}
integer MAX_RESTARTS 0
cores=$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NPROC ? cores / NPROC : 1))} # all ranks together: one per core
