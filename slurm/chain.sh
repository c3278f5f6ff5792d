#!/usr/bin/env bash
# Prepare, then train, then evaluate, each when the one before it has succeeded:
#   slurm/chain.sh [words for prepare] -- [words for train] -- [words for evaluate]
# A word that begins with -- is an option of sbatch, any other an override. With --array=0-15 among the first, the corpus
# is selected by one job, fetched by an array, and summed up by one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
run=outputs/slurm/chain-$(date +%Y-%m-%d_%H-%M-%S)

before= # the job that has to succeed first
submit() { # NAME SCRIPT WORDS...: queue the job, and say so
  local name=$1 script=$2 log=%x-%j.log options=() overrides=() number word
  shift 2
  for word in "$@"; do
    case $word in
      --array=*) log=%x-%A_%a.log options+=("$word") ;;
      --*) options+=("$word") ;;
      *) overrides+=("$word") ;;
    esac
  done
  [ -z "$before" ] || options+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
  number=$(sbatch --parsable --job-name="align_$name" --output="$log" "${options[@]}" "$here/$script" "${overrides[@]}")
  before=${number%%;*} # NUMBER;CLUSTER where there are several
  printf '%-9s job %-8s %s\n' "$name" "$before" "$(sed "s/%x/align_$name/; s/%j/$before/; s/%A/$before/; s/%a/*/" <<<"$log")"
}

group=0
prepare=() train=() evaluate=() array=
for word in "$@"; do
  if [ "$word" = -- ]; then
    group=$((group + 1))
  else
    case $group,$word in
      0,--array=*) array=$word ;;
      0,*) prepare+=("$word") ;;
      1,hydra.run.dir=*) run=${word#*=} ;;
      1,*) train+=("$word") ;;
      2,*) evaluate+=("$word") ;;
      *) echo "chain.sh: three groups of words, divided by -- twice" >&2 && exit 2 ;;
    esac
  fi
done

if [ -n "$array" ]; then
  submit select prepare.sbatch "${prepare[@]}" "source.steps=[select]"
  submit fetch prepare.sbatch "$array" "${prepare[@]}"
  submit summary prepare.sbatch "${prepare[@]}" "source.steps=[summary]"
else
  submit prepare prepare.sbatch "${prepare[@]}"
fi
submit train train.sbatch "hydra.run.dir=$run" "${train[@]}"
submit evaluate evaluate.sbatch "checkpoint=$run" "${evaluate[@]}"
echo "run folder: $run"
echo "look: squeue --me    end them all: scancel JOB ..."
