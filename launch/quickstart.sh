#!/usr/bin/env bash
# Why synchronize: a CNN on real handwritten digits, 2 ranks with 2 images each, with and without SyncBatchNorm.
set -euo pipefail
usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [--all] [--seeds K] [--epochs N]

Makes .venv, installs syncbn there, trains with unsynchronized BatchNorm and with SyncBatchNorm, and prints a table
(out/quickstart.csv has its runs) and the path of a plot, out/quickstart.png.

  --all       instance norm and group norm, too
  --seeds K   K runs of each norm; the table gives mean ± standard deviation (default: 1)
  --epochs N  passes over the training set (default: 6)
  --help      this text

PYTHON=/path/to/python chooses the interpreter that makes .venv (3.10 or newer).
END
}
refuse() {
    echo "quickstart.sh: $1" >&2
    usage >&2
    exit 2
}
norms=(batch syncbn) seeds=1 epochs=6
while [ $# -gt 0 ]; do
    case $1 in
        --all) norms=(batch syncbn instance group) ;;
        --seeds | --epochs)
            [[ ${2:-} =~ ^[1-9][0-9]{0,3}$ ]] || refuse "$1 takes an integer of at least 1; got '${2:-}'."
            declare "${1#--}=$2"
            shift
            ;;
        -h | --help) usage && exit 0 ;;
        *) refuse "there is no option '$1'." ;;
    esac
    shift
done
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train
log=out/quickstart.jsonl
mkdir -p out
rm -f "$log"
unset PYTHON # made .venv; from here on it is .venv's
for ((seed = 0; seed < seeds; seed++)); do
    for norm in "${norms[@]}"; do
        NPROC=2 bash launch/single_node.sh \
            --norm "$norm" --batch-size 2 --epochs "$epochs" --seed "$seed" --log-file "$log"
    done
done
python launch/summary.py "$log" --csv out/quickstart.csv --png out/quickstart.png
