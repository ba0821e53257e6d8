#!/usr/bin/env bash
# Everything that needs a GPU, within ten minutes: the GPU tests, compute-sanitizer, the kernels, the layer, the
# training step, the roofline. Uses this machine's python3 as it is.
#   bash benchmarks/gpu.sh               # rows and log.txt in ./out
#   OUT=/tmp/rows TOTAL=540 MACHINE=h200 bash benchmarks/gpu.sh
# Seven files, no folders: log.txt, kernels-, layer-, step- and compile-<machine>.csv, roofline.svg, layer.svg.
# A part may use its share of the time left, so what one part saves, the later ones have.
# Each part starts with its most telling rows; whatever was measured when time runs out is in the files.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
out=${OUT:-$PWD/out}
python=${PYTHON:-python3}
device=${DEVICE:-cuda}
total=${TOTAL:-570}
smoke=${SMOKE:+--smoke}
mkdir -p "$out"
exec > >(tee "$out/log.txt") 2>&1
started=$SECONDS
failed=()

# share <percent of the time left> -> seconds
share() { echo $(((total - SECONDS + started) * $1 / 100)); }

# part <percent> <name> <command…>: run with that share of the time left; {budget} in the command is it less 15 s
part() {
    local seconds name=$2 begin=$SECONDS status
    seconds=$(share "$1")
    shift 2
    if [ "$seconds" -lt 5 ]; then
        echo "=== $name: no time left"
        failed+=("$name")
        return
    fi
    local budget=$((seconds > 40 ? seconds - 15 : seconds / 2 + 1))
    echo "=== $name: at most $seconds s: ${*//\{budget\}/$budget}"
    timeout --kill-after=10 "$seconds" "${@//\{budget\}/$budget}"
    status=$?
    echo "=== $name: exit status $status after $((SECONDS - begin)) s"
    [ "$status" -eq 0 ] || failed+=("$name")
}

bench() { # bench <percent> <script> <arguments…>
    local percent=$1 script=$2
    shift 2
    part "$percent" "$script" "$python" -m "benchmarks.$script" --device "$device" --out "$out" --machine "$machine" \
        --budget "{budget}" $smoke "$@"
}

nvidia-smi 2>/dev/null || echo "no nvidia-smi"
slug='import torch; from benchmarks.harness import machine_slug; print(machine_slug(torch.device("'$device'")))'
machine=${MACHINE:-$("$python" -c "$slug")}
"$python" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__)'
echo "machine $machine, commit ${COMMIT:-$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}"

tests=${TESTS:-tests}
part 26 tests "$python" -m pytest "$tests" -m gpu -q --maxfail=20 --durations=10 -p no:cacheprovider
bench 25 kernels
bench 42 layer ${smoke:+--gpu-flow}
bench 45 step
bench 55 compile
watched=50
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
if [ -n "$sanitizer" ]; then
    for tool in memcheck racecheck; do
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 part $watched "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$python" -m benchmarks.every_kernel --device "$device" --budget "{budget}" $smoke
        watched=80
    done
else
    echo "=== no compute-sanitizer: every kernel runs unwatched"
    part 60 every_kernel "$python" -m benchmarks.every_kernel --device "$device" --budget "{budget}" $smoke
fi
if "$python" -c 'import matplotlib' 2>/dev/null; then
    part 90 roofline "$python" -m benchmarks.plot "$out/kernels-$machine.csv" "$out/roofline.svg"
    part 90 plot "$python" -m benchmarks.plot "$out/layer-$machine.csv" "$out/layer.svg"
else
    echo "=== no matplotlib: draw later with python -m benchmarks.plot"
fi
echo "=== all parts after $((SECONDS - started)) s; not clean: ${failed[*]:-none}"
wc -l "$out"/*.csv
[ "${#failed[@]}" -eq 0 ]
