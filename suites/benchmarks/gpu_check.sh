#!/usr/bin/env bash
# Everything that a GPU must show, from the repository root, in three parts of under ten minutes each:
#
#     suites/benchmarks/gpu_check.sh {1|2|3|all} [FOLDER]       FOLDER: reports/records when absent
#     suites/benchmarks/gpu_check.sh --dry-run [FOLDER]         every step on a CPU at tiny size; records say so
#
# A part holds the claims of its pairs first, natively (kernels compiled, bfloat16): red means no speed. Then every shape
# is one step that ends in a record of its own. A step that is done is not done again, so a part that was cut off goes on
# where it stopped; one that would not end in time is left for the next call. Nothing needs to be installed beyond a
# python3 with torch, triton, transformers and pytest. The last thing printed is a short table.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 3
if [ "${1:-}" = --dry-run ]; then parts="1 2 3" kind=dry device=cpu; else
    case "${1:-}" in 1 | 2 | 3) parts=$1 ;; all) parts="1 2 3" ;; *) sed -n '2,5p' "$0" >&2; exit 2 ;; esac
    kind=gpu device=cuda
fi
own=python3
if [ -x .venv/bin/python ]; then own=.venv/bin/python; fi
folder=${2:-reports/records} python=${PYTHON:-$own} limit=${LIMIT_S:-570}
mkdir -p "$folder"
done_file="$folder/$kind-steps.txt" start=$SECONDS status=0
touch "$done_file"
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TRITON_DEFAULT_FP_FUSION=1 HF_HUB_OFFLINE=1
dry=() short=(--short --baselines none) patience=2
# a machine without a GPU may be anybody's: its steps are short, and it may be slow
if [ "$kind" = dry ]; then dry=(--dry-run) patience=20; fi

# step NAME SECONDS COMMAND..: once, if there is time for it; its output stands beside its record
step() {
    local name=$1 needs=$2 code=0 began=$SECONDS
    shift 2
    if grep -qx "$name" "$done_file"; then echo "== $name: done before"; return 0; fi
    if [ "$kind" = gpu ] && [ $((limit - (SECONDS - start))) -lt "$needs" ]; then
        echo "== $name: left for the next call, it may take $needs s"; status=4; return 4
    fi
    timeout "$((needs * patience))" "$@" >"$folder/$kind-$name.log" 2>&1 || code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s"
    if [ "$code" = 0 ]; then echo "$name" >>"$done_file"; rm -f "$folder/$kind-$name.log"; else
        tail -n 15 "$folder/$kind-$name.log"; status=$code
    fi
    return "$code"
}

# claims NAME PAIR..: the claims about these pairs, and for the first part those about operations
claims() {
    local name=$1 where=(suites/correctness) how=(-m correctness --profile pinned -n 12)
    shift
    local pairs=("${@/#/--pair=}")
    if [ "$kind" = dry ]; then where=(suites/correctness/test_speculations.py) how=(-m correctness --profile pinned -n 0); fi
    step "claims-$name" 240 "$python" -m pytest "${where[@]}" "${how[@]}" "${pairs[@]}" -p no:cacheprovider \
        --require "$([ "$kind" = gpu ] && echo gpu)" --records "$folder/$kind-claims-$name.jsonl"
}

# shape PART NAME SECONDS OPTION..
shape() {
    local part=$1 name=$2 needs=$3
    shift 3
    step "$name" "$needs" "$python" -m suites.benchmarks.measure "$name" --record "$folder/$kind-$name.jsonl" \
        --claims "$folder/$kind-claims-$part.jsonl" "${dry[@]}" "$@"
}

# turns NAME FORM_A FORM_B: Llama in processes of their own, A B B A A B; equal forms are the A/A
turns() {
    local name=$1 i=0 form record
    for side in a b b a a b; do
        i=$((i + 1)) form=$([ "$side" = a ] && echo "$2" || echo "$3") record="$folder/$name-$side.jsonl"
        step "$name-$i" 30 "$python" -m suites.benchmarks.measure Llama-3.1-8B-eagle3 --record "$record" --batch 1 \
            --claims "$folder/$kind-claims-1.jsonl" --form "$form" --process "$i" --blocks 10 "${short[@]}" "${dry[@]}" || return
    done
}

part_1() {
    if [ "$kind" = gpu ]; then
        step claims-ops 200 "$python" -m pytest suites/correctness/test_ops*.py suites/correctness/test_replay.py -m correctness \
            --profile pinned -n 12 -p no:cacheprovider --require gpu --records "$folder/gpu-claims-ops.jsonl" || return
    fi
    claims 1 llama eagle3 llama-eagle3 || return
    shape 1 Llama-3.1-8B-eagle3 200
    local other=aten
    if [ "$kind" = gpu ]; then other=triton; fi
    turns "$kind-aa" "$other" "$other"
    turns "$kind-ab" aten "$other"
}

part_2() {
    claims 2 gemma4_unified gemma4_assistant gemma4_unified-assistant qwen3_moe qwen3_moe_mtp qwen3_moe-mtp \
        deepseek eagle3_mla deepseek-eagle3-mla || return
    shape 2 gemma-4-12B-assistant 150
    shape 2 Qwen3-30B-A3B-mtp 120 --baselines loops
    shape 2 DeepSeek-V2-Lite-eagle3-mla 100 --baselines loops
    step alone-Qwen 100 "$python" -m suites.benchmarks.measure Qwen3-30B-A3B-mtp --alone --blocks 5 "${dry[@]}" \
        --record "$folder/$kind-alone-Qwen.jsonl" --claims "$folder/$kind-claims-2.jsonl"
}

part_3() {
    claims 3 gemma3 eagle3 gemma3-eagle3 gemma4 gemma4_assistant gemma4-assistant || return
    shape 3 gemma-3-4b-eagle3 80 --baselines loops
    shape 3 gemma-3-12b-eagle3 90 --baselines loops
    shape 3 gemma-4-31B-assistant 100 --baselines none
    step alone-31B 60 "$python" -m suites.benchmarks.measure gemma-4-31B-assistant --alone --blocks 5 "${dry[@]}" \
        --record "$folder/$kind-alone-31B.jsonl" --claims "$folder/$kind-claims-3.jsonl"
    step ops 60 "$python" -m suites.benchmarks.ops gemma-3-12b-eagle3 gemma-4-31B-assistant "${dry[@]}" \
        --record "$folder/$kind-ops.jsonl" --claims "$folder/$kind-claims-3.jsonl"
    local real=(--device "$device" --pair qwen3_moe-mtp --dtype bfloat16 --no-big --profile pinned)
    if [ "$kind" = dry ]; then real+=(--num-prompts 2 --blocks 2); fi
    step real 90 "$python" -m suites.cli bench decode "${real[@]}" --runs "$folder/$kind-real"
    local ranks=2
    if [ "$kind" = gpu ]; then ranks=$("$python" -c 'import torch; print(torch.cuda.device_count())'); fi
    if [ "$ranks" -gt 1 ]; then
        step ranks 90 "$python" -m torch.distributed.run --nproc-per-node "$ranks" -m suites.benchmarks.decode \
            gemma-3-12b-eagle3 --record "$folder/$kind-ranks.jsonl" --claims "$folder/$kind-claims-3.jsonl" "${dry[@]}"
    fi
}

for part in $parts; do
    "part_$part" || true
done
find "$folder" -name "$kind-*.jsonl" -printf '%8s bytes  %p\n'
"$python" -m suites.benchmarks.summary "$folder" "$kind"
exit "$status"
