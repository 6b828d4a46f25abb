#!/usr/bin/env bash
# Everything that a GPU must show, from the repository root: gpu_check.sh [claims|speed|all] [FOLDER]
#
# Claims come first, natively and in bfloat16: red means no speed. Each part ends in its own records under FOLDER, so a
# run that is cut off leaves what it had. It needs python3 with torch, triton and transformers, and no installation.
# DEVICE=cpu walks the same steps without a GPU, at tiny size; its records say which device they come from.
set -uo pipefail
part=${1:-all} folder=${2:-reports/records} device=${DEVICE:-cuda} python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 TRITON_DEFAULT_FP_FUSION=1
mkdir -p "$folder"
need=gpu profile=ci size=(--num-prompts 80 --blocks 20)
if [ "$device" = cpu ]; then need="" profile=pinned size=(--num-prompts 2 --num-tokens 8 --blocks 2 --no-big); fi
status=0

if [ "$part" = claims ] || [ "$part" = all ]; then
    "$python" -m pytest suites/correctness -m correctness --profile "$profile" --require "$need" -n 4 \
        --records "$folder/claims-$device.jsonl" || status=$?
    [ "$status" = 0 ] || { echo "claims are red: no speed is measured"; exit "$status"; }
fi
if [ "$part" = speed ] || [ "$part" = all ]; then
    "$python" -m suites.cli bench all --device "$device" --profile pinned "${size[@]}" --runs "$folder" || status=$?
fi
echo "records:"
find "$folder" -name '*.jsonl' -newer "$0" -printf '%8s bytes  %p\n'
exit "$status"
