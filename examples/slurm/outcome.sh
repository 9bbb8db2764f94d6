# shellcheck shell=bash
# shellcheck disable=SC2034  # launch.sh reads `outcome` and `reason`
# Sourced by launch.sh: what became of a start, from what its ranks wrote, and what to do about it.
#
# srun's code does not tell: it is the highest of all ranks, and 143 or 137 of those that were ended with others. So each
# rank leaves a file (rank.sh), and a start that was asked to stop leaves `stop`.
#
#   code of the start        what it means                                     what happens
#   0                        every rank finished                               the job is over
#   75                       asked to stop; saved as far as it could           queued again, always
#   2, 3, any other          refused: settings, data, a full disk, a floor     the job is over
#   1, 76, 128 and more      a rank failed, was lost or was killed             queued again while checkpoints advance

exit_requeue=75
exit_lost=76

# The code of a start, in `outcome`, from the files of its ranks; srun's where no rank could write one.
read_outcome() { # folder of the endings, srun's code, number of ranks
  local folder="$1" ranks="$3" code failed="" refused="" saved="" found=0
  outcome="$2"
  while read -r code; do
    found=$((found + 1))
    case "$code" in
      0) ;;
      "$exit_requeue") saved="$code" ;;
      1 | "$exit_lost") failed="${failed:-$code}" ;;
      *)
        if [ "$code" -ge 128 ]; then
          failed="$code"
        else
          refused="${refused:-$code}"
        fi
        ;;
    esac
  done < <(sed -sn 's/.*"code": *\([0-9]*\).*/\1/p' "$folder"/rank-*.json 2>/dev/null)
  if [ "$found" -gt 0 ] && [ "$found" -lt "$ranks" ]; then
    failed="${failed:-$exit_lost}"
  fi
  if [ -n "$refused" ]; then
    outcome="$refused"
  elif [ -e "$folder/stop" ] && [ "$found" -gt 0 ] && [ -n "$saved$failed" ]; then
    outcome="$exit_requeue"
  elif [ "$found" -gt 0 ]; then
    outcome="${failed:-${saved:-0}}"
  elif [ -e "$folder/stop" ] && [ "$outcome" != 0 ]; then
    outcome="$exit_requeue"
  fi
}

is_failure() {
  [ "$1" = 1 ] || [ "$1" = "$exit_lost" ] || [ "$1" -ge 128 ]
}

# Nodes whose ranks were killed, broke down or left no word, and those that a watchdog blamed.
failed_nodes() { # folder of the endings, directory of --save
  local file
  {
    for file in "$1"/rank-*.node; do
      if [ -e "$file" ] && ! grep -qsE '"code": *([0-9]|[1-9][0-9]|1[01][0-9]|12[0-7])\b' "${file%.node}.json"; then
        cat "$file"
      fi
    done
    if [ -n "${2:-}" ]; then
      grep -o '"node": *"[^"]*"' "$2/culprits.json" 2>/dev/null | cut -d '"' -f 4 | cut -d . -f 1 || true
    fi
  } | sort -u
}

newest_checkpoint() { # directory of --save
  local found=""
  [ -z "${1:-}" ] || found="$(find "$1" -maxdepth 2 -path '*/step-????????/manifest.json' 2>/dev/null | sort | tail -n 1)"
  basename "$(dirname "${found:-none/none}")"
}

# Whether a start that failed is made again: at most MAX_FAILURES times, and only if there is a newer checkpoint than at
# the failure before. Says why in `reason`, and keeps a line per failure: checkpoint, code, nodes.
may_try_again() { # file of the failures, folder of the endings, directory of --save, code
  local file="$1" before count newest
  newest="$(newest_checkpoint "${3:-}")"
  touch "$file"
  count="$(wc -l <"$file")"
  before="$(tail -n 1 "$file" | cut -d ' ' -f 1)"
  echo "$newest $4 $(failed_nodes "$2" "${3:-}" | xargs)" >>"$file"
  if [ "$count" -ge "${MAX_FAILURES:-5}" ]; then
    reason="failure $((count + 1)), not started again (MAX_FAILURES=${MAX_FAILURES:-5})"
    return 1
  fi
  if [ "$count" -gt 0 ] && [ "$newest" = "$before" ]; then
    reason="no checkpoint since the failure before, not started again"
    return 1
  fi
  reason="failure $((count + 1)) of at most ${MAX_FAILURES:-5}, starts again from $newest"
}

# A user's scancel ends the job for good, whatever its ranks saved; a time limit does not.
was_cancelled() {
  local state
  state="$(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null || true)"
  [[ "$state" == *JobState=COMPLETING* || "$state" == *JobState=CANCELLED* ]] && [[ "$state" != *Reason=TimeLimit* ]]
}

# SLURM calls a job that ends after its limit TIMEOUT, even with code 0, and no other job may depend on that.
is_past_its_limit() {
  local end
  end="$(scontrol show job "$SLURM_JOB_ID" --oneliner 2>/dev/null | grep -o ' EndTime=[^ ]*' | cut -d = -f 2 || true)"
  end="$(date -d "${end:-unknown}" +%s 2>/dev/null || true)"
  [ -n "$end" ] && [ "$(date +%s)" -ge "$((end - 1))" ]
}

# Queued again, without the nodes that failed twice.
requeue() { # file of the failures
  local nodes known
  trap '' TERM # the requeue ends this script
  touch "$1"
  nodes="$(cut -d ' ' -f 3- "$1" | tr ' ' '\n' | sed '/^$/d' | sort | uniq -d | paste -sd ,)"
  scontrol requeue "$SLURM_JOB_ID"
  if [ -n "$nodes" ]; then
    known="$(scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o 'ExcNodeList=[^ ]*' | cut -d = -f 2 || true)"
    [ "$known" != "(null)" ] || known=""
    if scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$nodes${known:+,$known}"; then
      echo "left out from now on, for they failed twice: $nodes"
    fi
  fi
}
