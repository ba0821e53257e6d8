#!/usr/bin/env bash
# The two other examples on 2 ranks: a recurrent net on speech of different lengths, and a variational autoencoder.
set -euo pipefail
usage() {
    cat <<'END'
usage: bash launch/examples.sh

Makes .venv, installs syncbn there with what the examples need, trains both, each with and without what it is about,
and ends with their tables and the path of a picture, out/vae.png; what they print is in out/, too.
They run on 2 CPU ranks, or on one a GPU; NPROC=4 chooses how many.

PYTHON=/path/to/python chooses the interpreter that makes .venv; the speech data needs Python 3.11 or newer.
END
}
case ${1:-} in
    '') ;;
    -h | --help) usage && exit 0 ;;
    *)
        echo "examples.sh: there is no option '$1'." >&2
        usage >&2
        exit 2
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh" train,sequences
unset PYTHON # made .venv; from here on it is .venv's
me=examples.sh cpu_ranks=2
source launch/common.sh
mkdir -p out
train() { # train <script> <options…>
    "$PYTHON" launch/torchrun.py --standalone --nproc-per-node "$NPROC" "launch/$1.py" "${@:2}" | tee "out/$1.log"
}
train train_sequences
train train_vae --all --png out/vae.png
for example in train_sequences train_vae; do
    echo
    sed '1,/^$/d' "out/$example.log" # its table, which an empty line divides from its progress
done
