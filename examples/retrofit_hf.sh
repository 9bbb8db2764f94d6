#!/usr/bin/env bash
# Retro-fits a Hugging Face decoder: MODEL is its folder (Llama, Qwen, Mistral, Nemotron, StableLM, GPT-2).
#SBATCH --job-name=retro-hf
#SBATCH --nodes=2 --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --requeue --open-mode=append --output=%x-%j.log
#SBATCH --signal=USR1@300
#SBATCH --mail-type=END,FAIL
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
if [ ! -e "$here/slurm/launch.sh" ]; then # sbatch runs a copy of this file
  here="$SLURM_SUBMIT_DIR/examples"
fi
data="${DATA:-data}"
runs="${RUNS:-runs}"
model="${MODEL:?set MODEL to the folder of a Hugging Face decoder}"
name="$(basename "$model")"
tokenizer=(--tokenizer-type HuggingFaceTokenizer --tokenizer-model "$model/tokenizer.json")
choices=(
  --config "$here/retrofit_hf.toml"
  "${tokenizer[@]}"
  --data-path "$data/tokens/corpus_text_document"
  --database-path "$data/retro/database"
  --neighbor-path "$data/retro/neighbors/corpus"
  --load "$runs/$name"
  --save "$runs/retro-$name"
)
if [ ! -e "$runs/$name" ]; then
  case " $* " in
    *" --dry-run "*) choices+=(--plan-model "$model") ;; # nothing is converted: the plan reads its config.json
    *" --print-config "*) ;;
    *)
      mkdir -p "$runs"
      LAUNCHER=none "$here/slurm/launch.sh" convert "$model" "$runs/$name"
      ;;
  esac
fi
exec "$here/slurm/launch.sh" retrofit "${choices[@]}" "$@"
