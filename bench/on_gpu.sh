#!/usr/bin/env bash
# Everything that a GPU is needed for.
#
#   bench/on_gpu.sh                      # all sections, at most 9 minutes
#   bench/on_gpu.sh micro tune           # these, with the time that the others leave
#   bench/on_gpu.sh --minutes 20 micro   # another limit
#   bench/on_gpu.sh --dry-run            # every section on the CPU, at tiny sizes, at most 40 minutes
#
# Needs Python with torch, triton, pytest and pytest-benchmark; nvcc, compute-sanitizer, timm, transformers and peft where a
# section uses them. No network. Results are written to $OUT (default: build/on_gpu): on_gpu.log holds all output, a file
# for each section that leaves one. A section that fails does not stop those after it; the exit status tells.
set -uo pipefail
cd "$(dirname "$0")/.."

ALL=(build verdicts tests shapes cuda micro whole reparam sanitize tune)
dry=0 minutes= sections=()
while [ $# -gt 0 ]; do
    case $1 in
    --dry-run) dry=1 ;;
    --minutes) minutes=${2:?--minutes wants a number}; shift ;;
    -h | --help) sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 0 ;;
    -*) echo "unknown option $1; known: --dry-run, --minutes N, --help" >&2; exit 2 ;;
    *)
        [[ " ${ALL[*]} " == *" $1 "* ]] || { echo "unknown section $1; known: ${ALL[*]}" >&2; exit 2; }
        sections+=("$1")
        ;;
    esac
    shift
done
# a CPU with other work takes several times as long, and a dry run is to end
: "${minutes:=$((dry ? 40 : 9))}"
[[ $minutes =~ ^[0-9]+$ ]] || { echo "--minutes is $minutes, expected a whole number" >&2; exit 2; }
[ ${#sections[@]} -gt 0 ] || sections=("${ALL[@]}")

PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/on_gpu}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export OUT PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} TRITON_DEFAULT_FP_FUSION=1
if [ $dry = 1 ]; then
    export CUDA_VISIBLE_DEVICES= TRITON_INTERPRET=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
elif ! $PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "torch sees no GPU here; --dry-run tries every section on the CPU" >&2
    exit 2
fi

# Seconds that a section may take when all run; the rest goes to the last ones.
declare -A share=([build]=60 [verdicts]=60 [tests]=125 [shapes]=45 [cuda]=90 [micro]=110 [whole]=50 [reparam]=30 [sanitize]=40 [tune]=60)
total=0
for s in "${sections[@]}"; do total=$((total + share[$s])); done
end=$((SECONDS + 60 * minutes))
left=$total

build() {
    # here nvcc has GPUs to compile for, and a minute; in a dry run the kernels are the tests' and that takes a compiler
    [ $dry = 1 ] || export PREFIXATTN_CUDA=1 PREFIXATTN_CUDA_ARCHS=${PREFIXATTN_CUDA_ARCHS:-native}
    $PYTHON setup.py -q build_ext --inplace && $PYTHON -m prefixattn --no-verdicts || return
    [ $dry = 1 ] || nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv
}

verdicts() { $PYTHON -m prefixattn; }

tests() {
    if [ $dry = 1 ]; then
        $PYTHON -m pytest -q -p no:cacheprovider tests/attention/test_prefix_attn.py -k 'triton and test_shapes and (single or prefix_of_one) and fp32'
        return
    fi
    # a first failure tells more than the last of many alike; interrupted, pytest still reports what it has
    PREFIXATTN_TEST_DEVICE=cuda timeout -s INT "$1" $PYTHON -m pytest -q -p no:cacheprovider -n 16 --dist worksteal --maxfail 60 \
        -o filterwarnings=default --tb=short -rf tests/attention/test_prefix_attn.py \
        tests/attention/test_dropout.py tests/kernels/test_triton.py tests/attention/test_qkvpacked.py \
        tests/reparam/test_reparam.py tests/optim/test_optim.py \
        tests/attach/hf/test_gpt2.py tests/attach/hf/test_gpt2_train.py
}

shapes() {
    local options=(--baselines --minutes "$(minutes_of "$1")")
    [ $dry = 0 ] || options=(--small --minutes 0.2)
    $PYTHON -m bench.attention.check_shapes "${options[@]}"
}

# The CUDA kernels: their suite, what compute-sanitizer says of the small shapes, a thousand equal runs, and times.
cuda() {
    local tool status=0
    if [ $dry = 1 ]; then
        PREFIXATTN_CUDA_HOST=$($PYTHON setup.py -q build_cuda_host | tail -n 1) || return
        export PREFIXATTN_CUDA_HOST
        $PYTHON -m bench.attention.cuda_kernels --minutes 0.3
        return
    fi
    PREFIXATTN_TEST_DEVICE=cuda timeout -s INT $(($1 / 3)) $PYTHON -m pytest -q -p no:cacheprovider -n 8 --maxfail 20 \
        -o filterwarnings=default --tb=short -rf tests/native/cuda/test_op.py || status=1
    for tool in memcheck racecheck initcheck synccheck; do
        echo "compute-sanitizer --tool $tool"
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT $(($1 / 12)) compute-sanitizer --tool $tool --error-exitcode 9 \
            $PYTHON -m bench.attention.cuda_kernels --small --minutes "$(minutes_of $(($1 / 15)))" 2>&1 | tail -30 || status=1
    done
    $PYTHON -m bench.attention.cuda_kernels --minutes "$(minutes_of $(($1 / 3)))" --out "$OUT/cuda.json" || status=1
    return $status
}

micro() {
    local options=(--device gpu --minutes "$(minutes_of "$1")" --out "$OUT/micro.json")
    [ $dry = 0 ] || options+=(--quick -k packed)
    $PYTHON -m pytest -q -p no:cacheprovider --benchmark-disable-gc bench/attention/bench_prefix_attn.py "${options[@]}" &&
        $PYTHON -m bench.attention.plot_gpu "$OUT/micro.json" && rm "$OUT/micro.md" # the log has it
}

whole() {
    local options=(--minutes "$(minutes_of "$1")" --out "$OUT/whole_step.json")
    [ $dry = 0 ] || options+=(--dry-run)
    $PYTHON -m bench.models.whole_step "${options[@]}"
}

reparam() {
    local options=(--device gpu --out "$OUT/reparam.json")
    [ $dry = 0 ] || options+=(--quick)
    $PYTHON -m pytest -q -p no:cacheprovider bench/reparam/bench_reparam.py "${options[@]}" &&
        $PYTHON -m bench.reparam.plot "$OUT/reparam.json" && rm "$OUT/reparam.md"
}

sanitize() {
    if [ $dry = 1 ]; then
        $PYTHON -m bench.attention.check_shapes --small --minutes 0.05
        return
    fi
    local tool status=0
    for tool in memcheck racecheck; do
        echo "compute-sanitizer --tool $tool"
        # an allocation of its own for each tensor, or what lies past one would be another's
        PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout -s INT $(($1 / 2)) compute-sanitizer --tool $tool --error-exitcode 9 \
            $PYTHON -m bench.attention.check_shapes --small 2>&1 | tail -40 || status=1
    done
    return $status
}

tune() {
    if [ $dry = 1 ]; then
        $PYTHON -m bench.static.tune --arch sm_90 --kernel fwd_fold --type bf16 --head-dim 64 --minutes 0.5
        return
    fi
    local arch kernel
    arch=$($PYTHON -c 'import torch; from prefixattn.kernels import table; print(table.architecture(torch.device("cuda")))')
    # compiling takes longest and needs no GPU: all candidates at once into Triton's cache, then one after the other is timed
    for kernel in fwd fwd_medium fwd_short fwd_fold bwd_short bwd_keys bwd_prefix bwd_queries; do
        timeout $(($1 / 2)) $PYTHON -m bench.static.tune --arch "$arch" --every --kernel $kernel --type bf16 --head-dim 64 \
            >/dev/null 2>&1 &
    done
    wait
    $PYTHON -m bench.static.tune --type bf16 --head-dim 64 --minutes "$(minutes_of $(($1 / 2)))" --out "$OUT/tune.json"
}

minutes_of() { awk -v s="$1" 'BEGIN { print s / 60 }'; }

for section in "${sections[@]}"; do
    # an equal stretch for all of them when time is short or ample
    seconds=$(((end - SECONDS) * share[$section] / (left > 0 ? left : 1)))
    left=$((left - share[$section]))
    if [ $seconds -lt 5 ]; then
        echo "== $section: no time left"

        continue
    fi
    echo "== $section (at most ${seconds} s of $((end - SECONDS)))"
    began=$SECONDS
    # a shell of its own, so that a limit can end it whole
    export -f build verdicts tests shapes cuda micro whole reparam sanitize tune minutes_of
    export dry PYTHON
    timeout -k 10 $((seconds + 15)) bash -uo pipefail -c "$section $seconds"
    status=$?
    echo "== $section: status $status after $((SECONDS - began)) s"
done 2>&1 | tee "$OUT/on_gpu.log"
# the loop above ran in a pipe, so its list is in the log alone
if grep -q '^== [a-z]*: \(no time left\|status [1-9]\)' "$OUT/on_gpu.log"; then
    echo "failed: $(grep -o '^== [a-z]*: \(no time left\|status [1-9][0-9]*\)' "$OUT/on_gpu.log" | cut -c 4- | paste -sd ';')"
    exit 1
fi
echo "all sections passed; results in $OUT"
