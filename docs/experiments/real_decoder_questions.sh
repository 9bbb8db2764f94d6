#!/usr/bin/env bash
# Questions of SQuAD, closed book, with a found passage in the prompt, and with it in cross-attention; each as it is and
# after the same instruction tuning. Needs what real_decoder.sh made; each step is passed over when it is done.
#   SQUAD   train-v1.1.json
#   DATA    where real_decoder.sh put everything (default: runs/real_decoder)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
squad="$(realpath "${SQUAD:?set it to train-v1.1.json}")"
cd "${DATA:-$here/../../runs/real_decoder}"
if [ ! -e squad/passages.jsonl ]; then
  python "$here/squad_questions.py" "$squad" squad
fi

tune() { # model, run, flags
  local model="$1" run="$2"
  shift 2
  megatron-retro finetune --load "$model" --save "$run" --instruction-template instruct-retro \
    --instruction-data squad/tune.jsonl --num-contexts 1 --pack-examples --train-iters 48 --lr 5e-5 --min-lr 5e-6 \
    --lr-decay-style cosine --lr-warmup-iters 4 --micro-batch-size 1 --global-batch-size 1 --eval-iters 0 \
    --log-interval 1 --save-interval 12 --keep-checkpoints 1 "$@"
}
ask() { # model, results, passages in the prompt, in cross-attention
  local encoder=--eval-encoder
  if [ "$4" = 0 ]; then
    encoder=--no-eval-encoder
  fi
  if [ ! -e "squad/$2/results.json" ]; then
    megatron-retro evaluate squad1 --load "$1" --eval-data squad1=squad/questions.json --eval-output "squad/$2" \
      --eval-max-new-tokens 16 --max-sequence-length 1024 --eval-passages squad/passages.jsonl --eval-contexts bm25 \
      --eval-num-contexts "$3" --eval-encoder-contexts "$4" "$encoder" --dtype fp32 --device cpu
  fi
}

tune mixed squad-cross --context-place encoder --seq-length 576
tune gpt squad-prompt --context-place prompt --seq-length 896
tune gpt squad-closed --context-place none --seq-length 448
ask squad-cross tuned-cross 0 1
ask squad-closed tuned-closed 0 0
ask squad-prompt tuned-prompt 1 0
ask mixed cross 0 1
ask gpt closed 0 0
ask gpt prompt 1 0
python "$here/compared_answers.py" closed=squad/closed cross=squad/cross prompt=squad/prompt \
  "closed, tuned=squad/tuned-closed" "cross, tuned=squad/tuned-cross" "prompt, tuned=squad/tuned-prompt" \
  --json "$here/real_decoder_questions.json"
