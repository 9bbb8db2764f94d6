#!/usr/bin/env bash
# What neighbours are worth to a real decoder: in its prompt, through cross-attention that starts from its own layers (at
# their own depth, or from the last of eight), and through one that starts from noise; beside training on without them.
# Each step is passed over when it is done; a stopped one goes on.
#   MODEL           a Hugging Face folder (the figures: SmolLM2-135M-Instruct)
#   TEXT, HELD_OUT_TEXT, DATABASE_TEXT
#                   JSON lines with "text", to train on, to measure on and to search in
#   OTHER_TEXT, OTHER_DATABASE_TEXT
#                   absolute paths, of another domain; left out if not given
#   DATA            where everything goes (default: runs/real_decoder)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
model="$(realpath "${MODEL:?set it to a Hugging Face folder}")"
texts=("train=${TEXT:?}" "held_out=${HELD_OUT_TEXT:?}" "database=${DATABASE_TEXT:?}")
for number in "${!texts[@]}"; do
  texts[number]="${texts[number]%%=*}=$(realpath "${texts[number]#*=}")"
done
DATA="${DATA:-$here/../../runs/real_decoder}"
mkdir -p "$DATA/corpus"
cd "$DATA"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model")
if [ ! -e gpt ]; then
  megatron-retro convert "$model" gpt
fi
for text in "${texts[@]}"; do
  prefix="corpus/${text%%=*}"
  if [ ! -e "${prefix}_text_document.manifest.json" ]; then
    megatron-retro preprocess --input "${text#*=}" --output-prefix "$prefix" --append-eod "${tokenizer[@]}"
  fi
done
if [ ! -e retrieval/neighbors/held_out ]; then
  megatron-retro build-retrieval --retro-project-dir retrieval --retro-chunk-length 64 --retro-index-str Flat \
    --retro-tasks train encode merge query "${tokenizer[@]}" --retro-database-corpus corpus/database_text_document \
    --retro-query-corpus train=corpus/train_text_document held_out=corpus/held_out_text_document
fi
noise=(--retro-init noise --retro-zero-init-output --retro-gate-type fixed --retro-neighbor-positions rotary
  --retro-layers 18 19 21 24 25 --retro-encoder-layers 2 --no-retro-encoder-causal --no-retro-encoder-final-norm
  --no-freeze-encoder --retro-random-retrieval-probability 0.25 --micro-batch-size 1 --global-batch-size 1)
fit=(megatron-retro retrofit --config "$here/real_decoder.toml")
"${fit[@]}" --save mixed
"${fit[@]}" --no-freeze-decoder --lr 1e-4 --min-lr 1e-5 --exit-interval 33 --save unfrozen
"${fit[@]}" --retro-random-retrieval-probability 0 --train-iters 24 --save same-depth
"${fit[@]}" --lr 1e-12 --min-lr 1e-12 --lr-warmup-iters 0 --train-iters 1 --save untrained
last=(megatron-retro retrofit --config "$here/real_decoder_last.toml")
"${last[@]}" --save warm
"${last[@]}" "${noise[@]}" --train-iters 33 --save noise
on=(megatron-retro pretrain --config "$here/real_decoder_continued.toml" --finetune "${tokenizer[@]}")
"${on[@]}" --save continued
"${on[@]}" --train-iters 39 --save longer
if [ ! -e corpus/prompted.manifest.json ]; then
  python "$here/prompted_text.py" corpus/train_text_document --database retrieval/database \
    --neighbors retrieval/neighbors/train --output corpus/prompted
fi
"${on[@]}" --data-path corpus/prompted --seq-length 704 --save prompted
measure=(python "$here/real_decoder.py" gpt --text corpus/held_out_text_document --database retrieval/database
  --neighbors retrieval/neighbors/held_out)
"${measure[@]}" --retro mixed=mixed --between --work losses-between --json "$here/real_decoder_between.json"
"${measure[@]}" --retro mixed=mixed same-depth=same-depth untrained=untrained unfrozen=unfrozen warm=warm \
  noise=noise --trained continued=continued longer=longer prompted=prompted --work losses --json "$here/real_decoder.json"
python "$here/generation_cost.py" gpt mixed --text corpus/held_out_text_document --database retrieval/database \
  --neighbors retrieval/neighbors/held_out --json "$here/real_decoder_seconds.json"
for part in half=0.5 quarter=0.25 eighth=0.125; do
  "${measure[@]}" --retro mixed=mixed --keep-fraction "${part#*=}" --work "losses-${part%=*}" \
    --json "$here/real_decoder_${part%=*}.json"
done

# Another database without training: OTHER_TEXT of another domain in OTHER_DATABASE_TEXT, if both are given.
if [ -n "${OTHER_TEXT:-}" ]; then
  mkdir -p other
  for text in "held_out=$OTHER_TEXT" "database=${OTHER_DATABASE_TEXT:?}"; do
    prefix="other/${text%%=*}"
    if [ ! -e "${prefix}_text_document.manifest.json" ]; then
      megatron-retro preprocess --input "${text#*=}" --output-prefix "$prefix" --append-eod "${tokenizer[@]}"
    fi
  done
  megatron-retro build-retrieval --retro-project-dir other/retrieval --retro-chunk-length 64 --retro-index-str Flat \
    --retro-tasks train encode merge query "${tokenizer[@]}" --retro-database-corpus other/database_text_document \
    --retro-query-corpus held_out=other/held_out_text_document
  python "$here/real_decoder.py" gpt --text other/held_out_text_document --database other/retrieval/database \
    --neighbors other/retrieval/neighbors/held_out --retro mixed=mixed --work losses-other \
    --json "$here/real_decoder_python.json"
fi
