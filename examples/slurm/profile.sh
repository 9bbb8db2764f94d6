# shellcheck shell=bash
# Sourced by submit.sh and launch.sh, which set `slurm` to this folder: the profile of the cluster, a file of NAME=value
# lines like cluster.env.example, from $CLUSTER or from cluster.env beside this file. Every name in it is exported, so
# that variables of NCCL, gloo and torch reach the job. Without a profile nothing is asked for beyond nodes and GPUs.

read_profile() {
  local profile="${CLUSTER:-$slurm/cluster.env}"
  if [ -e "$profile" ]; then
    profile="$(realpath "$profile")"
    set -a
    # shellcheck source=/dev/null
    source "$profile"
    set +a
    export CLUSTER="$profile"
  elif [ -n "${CLUSTER:-}" ]; then
    echo "error: CLUSTER=$CLUSTER is no file; write one like $slurm/cluster.env.example" >&2
    exit 2
  fi
}

# What sbatch is told of the profile, in `profile_options`.
read_sbatch_options() {
  read -r -a profile_options <<<"${SBATCH_OPTIONS:-}"
  profile_options+=(${ACCOUNT:+"--account=$ACCOUNT"} ${PARTITION:+"--partition=$PARTITION"} ${TIME:+"--time=$TIME"}
    ${MEMORY:+"--mem=$MEMORY"} ${CPUS_PER_TASK:+"--cpus-per-task=$CPUS_PER_TASK"})
}

load_modules() {
  local -a names
  read -r -a names <<<"${MODULES:-}"
  if [ "${#names[@]}" -gt 0 ]; then
    if ! type module >/dev/null 2>&1; then
      echo "error: MODULES=$MODULES, and there is no command \`module\` on $(hostname)" >&2
      exit 2
    fi
    module load "${names[@]}"
  fi
}

read_profile
