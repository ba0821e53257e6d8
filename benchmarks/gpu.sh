#!/usr/bin/env bash
# Everything that needs a GPU, in parts: each has its seconds, and what fails or hangs in one costs the others nothing.
#   bash benchmarks/gpu.sh first              # is it right, how fast is it: at most 460 s
#   bash benchmarks/gpu.sh second             # sanitizers, profiler, torch.compile: at most 320 s
#   bash benchmarks/gpu.sh kernels:60 layer   # these parts alone, one of them with other seconds
# Without a name, first and second. It uses this machine's python3 as it is, and
#   OUT=out       the folder of the results; what is there is added to. At most eight files: log.txt, ncu.txt and
#                 kernels-, layer-, host-, step-, compile- and parts-<machine>.csv, the last with each part's exit status
#   TOTAL=400     seconds for all parts: what does not fit any more is shortened, then skipped
#   MACHINE=h100  the machine's name in rows and file names; COMMIT=<hash> where there is no repository
#   TESTS=tests   what pytest is given; PYTHON; DEVICE=cuda; SMOKE=1 for tiny shapes and four times the seconds
# Each part starts with its most telling rows, and each row is in its file at once.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 PYTHONUTF8=1
declare -A lists=(
    [first]="versions:5 precompile:35 smoke:25 kernels:105 layer:105 host:15 step:70 tests:100"
    [second]="memcheck:80 racecheck:50 ncu:40 compile:150"
)
first_tests="bits_repeat or graph_replay or streams_do_not or (dtypes_and_layouts and dtype1 and (64 or 512 or 33))"
versions='import shutil, sys; from importlib import metadata
found = {each.metadata["Name"]: each.version for each in metadata.distributions()}
names = ("torch", "triton", "numpy", "pytest", "pytest-timeout")
print("python", sys.version.split()[0], *(f"{name} {found.get(name)}" for name in names), "gcc", shutil.which("gcc"))'

out=${OUT:-$PWD/out} python=${PYTHON:-python3} device=${DEVICE:-cuda} tests=${TESTS:-tests} smoke=${SMOKE:+--smoke}
[ $# -gt 0 ] || set -- first second
parts=() sum=0 failed=() unwatched=
for word; do
    known=" ${lists[first]} ${lists[second]} "
    name=${word%%:*}
    if [ -n "${lists[$word]:-}" ]; then
        parts+=(${lists[$word]})
    elif [[ $known =~ " $name:"([0-9]+)" " && $word =~ ^[a-z]+(:([0-9]+))?$ ]]; then
        usual=${known#*" $name:"}
        parts+=("$name:${BASH_REMATCH[2]:-${usual%% *}}")
    else
        echo "There is no part $word; there are first, second and$known" >&2
        exit 2
    fi
done
factor=$((1 ${SMOKE:+* 4}))
for part in "${parts[@]}"; do sum=$((sum + ${part#*:} * factor)); done
total=${TOTAL:-$sum}
mkdir -p "$out"
exec > >(tee -a "$out/log.txt") 2>&1
started=$SECONDS

tool() { # tool <name> -> where it is, nothing where it is not
    command -v "$1" || ls "/usr/local/cuda/bin/$1" /opt/nvidia/nsight-compute/*/"$1" 2>/dev/null | tail -n 1
}

bench() { # bench <script> <options…>: its command
    local csv=$out/$1-$machine.csv
    command=("$python" -m "benchmarks.$1" --device "$device" --out "$out" --machine "$machine" --budget "{budget}")
    command+=($smoke "${@:2}")
    [ ! -e "$csv" ] || command+=(--append)
}

gpu_tests() { # gpu_tests <what…>: pytest's command; without addopts, which names a plugin; compilers run side by side
    command=("$python" -m pytest "$@" -m gpu -q -o addopts= -W default --maxfail=40 -rfE --tb=short --durations=10)
    command+=(-p no:benchmark -p no:cacheprovider)
    "$python" -c 'import pytest_timeout' 2>/dev/null && command+=(--timeout=60)
    [ "$device" = cpu ] || { "$python" -c 'import xdist' 2>/dev/null && command+=(-n 6 --dist load); }
}

every_kernel() { # every_kernel <tool>: watched by it, or, where there is no sanitizer, once unwatched
    local sanitizer
    sanitizer=$(tool compute-sanitizer)
    command=("$python" -m benchmarks.every_kernel --device "$device" --budget "{half}" $smoke)
    if [ -n "$sanitizer" ]; then
        command=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$1" --error-exitcode 9 "${command[@]}")
    else
        echo "=== $1: no compute-sanitizer here; every kernel runs unwatched, once"
        [ -z "$unwatched" ] || command=()
        unwatched=1
    fi
}

profile() { # one large call of each verb under ncu
    local ncu
    ncu=$(tool ncu)
    command=("$ncu" --clock-control none --kernel-name "regex:batch_sums|grad_sums" --launch-count 4)
    for section in SpeedOfLight MemoryWorkloadAnalysis Occupancy WarpStateStats; do command+=(--section $section); done
    command+=(--print-details all --log-file "$out/ncu.txt")
    command+=("$python" -m benchmarks.every_kernel --large --device "$device")
    [ -n "$ncu" ] || { echo "=== ncu: not here" && command=(); }
}

prepare() { # prepare <part>: its command
    case $1 in
    versions) command=(bash -c '"$1" -c "$2"; nvidia-smi || echo "no nvidia-smi"' - "$python" "$versions") ;;
    precompile) command=("$python" -m benchmarks.precompile --budget "{most}" $smoke) ;;
    smoke) gpu_tests tests/test_gpu_device.py -k "$first_tests" ;;
    tests) gpu_tests "$tests" ;;
    layer) bench layer --reps 20 ${smoke:+--gpu-flow} ;;
    host) bench host --reps 300 ;;
    compile) bench compile --ranks 1 ;;
    memcheck | racecheck) every_kernel "$1" ;;
    ncu) profile ;;
    *) bench "$1" ;;
    esac
}

run() { # run <part> <seconds>; in its command {budget} is them less 15 s, {half} half, {most} all but 3 s
    local name=$1 seconds=$(($2 * factor)) left=$((total - SECONDS + started)) begin=$SECONDS status budget
    [ "$seconds" -le "$left" ] || seconds=$left
    [ "$seconds" -ge 5 ] || { echo "=== $name: skipped, no time left" && failed+=("$name") && return; }
    prepare "$name"
    [ ${#command[@]} -gt 0 ] || return
    budget=$((seconds > 40 ? seconds - 15 : seconds / 2 + 1))
    command=("${command[@]//\{budget\}/$budget}")
    command=("${command[@]//\{half\}/$((seconds / 2))}")
    command=("${command[@]//\{most\}/$((seconds - 3))}")
    echo "=== $name: at most $seconds s: ${command[*]%%$'\n'*}"
    timeout --kill-after=5 "$seconds" "${command[@]}" </dev/null
    status=$?
    echo "=== $name: exit status $status after $((SECONDS - begin)) s"
    [[ $name$unwatched != *check1 ]] || name=unwatched
    echo "$(date +%F),$commit,$machine,$name,$((SECONDS - begin)),$status" >>"$parts_csv"
    [ "$status" -eq 0 ] || failed+=("$1")
}

slug='import torch; from benchmarks.machine import machine_slug; print(machine_slug(torch.device("'$device'")))'
machine=${MACHINE:-$(timeout 60 "$python" -c "$slug" || echo unknown)}
commit=${COMMIT:-$(git rev-parse --short=10 HEAD 2>/dev/null || echo unknown)}
echo "=== ${parts[*]} on $machine, commit $commit"
parts_csv=$out/parts-$machine.csv
[ -e "$parts_csv" ] || echo date,commit,machine,part,seconds,status >"$parts_csv"
for part in "${parts[@]}"; do run "${part%:*}" "${part#*:}"; done
rm -f "$out"/*.new
echo "=== all parts after $((SECONDS - started)) s; not clean: ${failed[*]:-none}"
timeout 20 "$python" -m benchmarks.summary "$out"
sleep 0.3 # for tee
[ "${#failed[@]}" -eq 0 ]
