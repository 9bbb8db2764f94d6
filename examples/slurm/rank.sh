#!/usr/bin/env bash
# One task of srun: starts a program, keeps a signal that comes before the program listens, and writes how it ended.
#
#   rank.sh FOLDER COMMAND...
#
# FOLDER/stop           the first signal that came, and its node
# FOLDER/rank-N.node    where this task runs
# FOLDER/rank-N.json    code and reason; a program of ours writes them itself, with words (runtime/endings.py)
set -euo pipefail

folder="${1:?usage: rank.sh FOLDER COMMAND...}"
shift
rank="${SLURM_PROCID:-0}"
node="${SLURMD_NODENAME:-$(hostname)}"
export MEGATRON_RETRO_ENDINGS="$folder" MEGATRON_RETRO_ENDING_RANK="$rank"
interrupted=false
program=""

# The program begins with both signals ignored, and looks for FOLDER/stop when it begins to listen. So the file is
# written first, and then the signal handed on.
# shellcheck disable=SC2329  # traps call it
note() {
  interrupted=true
  if [ ! -e "$folder/stop" ]; then
    echo "$1 $node" >"$folder/stop.$rank" && mv "$folder/stop.$rank" "$folder/stop" || true
  fi
  [ -z "$program" ] || kill -s "$1" "$program" 2>/dev/null || true
}

trap 'note TERM' TERM
trap 'note USR1' USR1
echo "$node" >"$folder/rank-$rank.node" || true # on a full disk the code alone must do
(
  trap '' TERM USR1
  exec "$@"
) &
program=$!
while true; do
  interrupted=false
  status=0
  wait "$program" || status=$?
  "$interrupted" || break
done
if [ ! -e "$folder/rank-$rank.json" ]; then
  why="it ended with code $status"
  if [ "$status" -gt 128 ]; then
    why="it was ended by signal $(kill -l "$status")"
  fi
  [ "$status" != 0 ] || why=""
  printf '{"rank": %s, "node": "%s", "code": %s, "time": %s, "why": "%s"}\n' \
    "$rank" "$node" "$status" "$(date +%s)" "$why" >"$folder/rank-$rank.partial" &&
    mv "$folder/rank-$rank.partial" "$folder/rank-$rank.json" || true
fi
exit "$status"
