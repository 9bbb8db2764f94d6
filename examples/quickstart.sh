#!/usr/bin/env bash
# Every stage on text that every machine has: corpus -> tokens -> index -> neighbours -> GPT -> Retro -> leakage -> text
# -> instruction tuning -> one page that says what was seen.
#   --output DIR   where everything goes (default: runs/quickstart); a second start goes on where the first stopped
#   --setup-only   stop after the set-up
set -euo pipefail
repository="$(cd "$(dirname "$0")/.." && pwd)"
# shellcheck source=tools/setup_environment.sh
source "$repository/tools/setup_environment.sh"

output="$repository/runs/quickstart"
setup_only=false
while [ "$#" -gt 0 ]; do
  case "$1" in
    --output)
      [ "$#" -gt 1 ] || { echo "error: --output takes a folder" >&2; exit 2; }
      output="$2"; shift 2 ;;
    --setup-only) setup_only=true; shift ;;
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0"; exit ;;
    *) echo "error: unknown argument $1 (known: --output DIR, --setup-only)" >&2; exit 2 ;;
  esac
done

setup_environment retrieval,serve
if "$setup_only"; then
  exit 0
fi
mkdir -p "$output"
cd "$output"
config="$repository/examples/quickstart.toml"
tokenizer=(--tokenizer-type SentencePieceTokenizer --tokenizer-model corpus/tokenizer.model)
data=(--data-path corpus/train_text_document --valid-data-path corpus/held_out_text_document)
neighbors=(--database-path retrieval/database --neighbor-path retrieval/neighbors/train
  --valid-neighbor-path retrieval/neighbors/held_out)

# Stages are named when they begin, and their times are written down when they end.
stage="" began=$SECONDS
step() {
  end_step
  stage="$1" began=$SECONDS
  echo
  echo "== $1"
}
end_step() {
  if [ -n "$stage" ]; then
    printf '{"stage": "%s", "seconds": %d}\n' "$stage" "$((SECONDS - began))" >>stages.jsonl
  fi
  stage=""
}

# Interrupted on purpose: the run saves, leaves with code 75, and the same command goes on where it stopped.
until_done() {
  local code=0
  "$@" || code=$?
  if [ "$code" = 75 ]; then
    echo "-- interrupted on purpose; the same command goes on"
    "$@"
  else
    return "$code"
  fi
}

if [ ! -f corpus/held_out_questions.jsonl ]; then
  step "corpus: the standard library's own sources and reference, whole files held out"
  megatron-retro collect-text --collect-output corpus
fi

if [ ! -f corpus/tokenizer.model ]; then
  step "tokenizer"
  megatron-retro train-tokenizer --input corpus/train.jsonl --tokenizer-output corpus/tokenizer \
    --tokenizer-vocab-size 2048
fi

for part in train held_out; do
  if [ ! -f "corpus/${part}_text_document.manifest.json" ]; then
    step "tokens of $part"
    python "$repository/tools/preprocess_data.py" --input "corpus/$part.jsonl" --output-prefix "corpus/$part" \
      "${tokenizer[@]}" --append-eod
  fi
done

# What trains is a third of what is searched: more than is read, in stretches from all over the corpus.
step "index and neighbours"
megatron-retro build-retrieval --config "$config" --retro-project-dir retrieval "${tokenizer[@]}" \
  --retro-database-corpus corpus/train_text_document \
  --retro-query-corpus train=corpus/train_text_document held_out=corpus/held_out_text_document \
  --retro-query-rows train=0:12000 train=28000:40000 train=56000:68000 train=84000:96000

if [ ! -f neighbors.html ]; then
  step "a first page: held-out chunks beside their neighbours, shared runs marked"
  megatron-retro inspect-neighbors --retro-project-dir retrieval --inspect-output neighbors.html \
    --retro-query-corpus held_out=corpus/held_out_text_document
  echo "open it while the models train: $output/neighbors.html"
fi

step "a GPT"
megatron-retro pretrain --config "$config" "${tokenizer[@]}" "${data[@]}" --train-iters 500 --save gpt

step "retro-fitting it: encoder and chunked cross-attention are new, everything trains"
until_done megatron-retro retrofit --config "$config" "${tokenizer[@]}" "${data[@]}" "${neighbors[@]}" \
  --train-iters 600 --load gpt --save retro --exit-interval 300

if [ ! -f retro/evaluation/perplexity.json ]; then
  step "leakage: is it copying?"
  megatron-retro evaluate perplexity --load retro --eval-output retro/evaluation --perplexity-windows 160
fi

step "text with and without retrieval"
text=(generate --load retro --prompt "def __init__(self, " --max-new-tokens 64)
megatron-retro "${text[@]}" --retro-index retrieval --output text/with_retrieval.jsonl
megatron-retro "${text[@]}" --retrieval none --output text/without.jsonl

step "instruction tuning on questions about the files that were trained on; the encoder is off"
megatron-retro finetune --config "$config" --load retro --save instruct --retro-attention-gate 0 --context-place none \
  --instruction-data corpus/train_questions.jsonl --instruction-valid-data corpus/held_out_questions.jsonl \
  --seq-length 192 --skip-long-examples --train-iters 150 --global-batch-size 8 --lr 2e-3 --eval-iters 8

step "answers before and after, to questions about held-out files"
awk 'NR % 25 == 1' corpus/held_out_questions.jsonl >questions.jsonl
for model in retro instruct; do
  megatron-retro generate --load "$model" --retrieval none --chat --prompt-file questions.jsonl --max-new-tokens 40 \
    --no-show-neighbors --output "answers/$model.jsonl"
done

step "reports"
megatron-retro report gpt retro instruct
end_step
megatron-retro report gpt retro instruct --report-output report.html --report-retrieval retrieval \
  --report-texts "with retrieval=text/with_retrieval.jsonl" "without=text/without.jsonl" \
  --report-answers "before=answers/retro.jsonl" "after=answers/instruct.jsonl" --report-questions questions.jsonl \
  --report-stages stages.jsonl

cat <<MESSAGE

The whole story on one page, what you should see first:
  $output/report.html
Talk to the model, with its neighbours beside each chunk:
  megatron-retro serve --load $output/retro --retro-index $output/retrieval
MESSAGE
