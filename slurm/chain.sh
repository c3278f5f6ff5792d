#!/usr/bin/env bash
# Prepare, then train, then evaluate, each when the one before it has succeeded:
#   slurm/chain.sh [words for prepare] -- [words for train] -- [words for evaluate]
# A word that begins with -- is an option of sbatch, any other an override. With --array=0-15 among the first, the corpus
# is selected by one job, fetched by an array, and summed up by one.
set -eo pipefail # no -u: before bash 4.4 it takes an empty array for an unset one
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
  echo "chain.sh: $1" >&2
  exit 2
}

submitted=()
cancel_if_incomplete() {
  local status=$?
  if [ "$status" != 0 ] && [ ${#submitted[@]} != 0 ]; then
    scancel "${submitted[@]}" && echo "chain.sh: cancelled ${submitted[*]}, since not all could be submitted" >&2
  fi
}
trap cancel_if_incomplete EXIT

before= # the job that has to succeed first
submit() { # NAME SCRIPT WORDS...: queue the job, and say so
  local what=$1 name=align_$1 script=$2 log=%x-%j.log given='' options=() overrides=() number
  shift 2
  for word in "$@"; do
    case $word in
      --array=*) log=%x-%A_%a.log ;;
      --output=*) given=${word#*=} ;;
      --job-name=*) name=${word#*=} ;;
    esac
    case $word in
      --*) options+=("$word") ;;
      *) overrides+=("$word") ;;
    esac
  done
  log=${given:-$log}
  [ -z "$before" ] || options+=(--dependency="afterok:$before" --kill-on-invalid-dep=yes)
  number=$(sbatch --parsable "${options[@]}" --job-name="$name" --output="$log" "$here/$script" "${overrides[@]}")
  before=${number%%;*} # NUMBER;CLUSTER where there are several
  submitted+=("$before")
  log=${log//%x/"$name"} log=${log//%[jA]/"$before"}
  printf '%-9s job %-8s %s\n' "$what" "$before" "${log//%a/*}"
}

group=0 run=
prepare=() train=() evaluate=() array=
for word in "$@"; do
  case $word in
    -h | --help) sed -n '2,5s/^# //p' "${BASH_SOURCE[0]}" && exit ;;
    -- | --*=* | --exclusive | --hold | --contiguous | --oversubscribe | --requeue | --no-requeue) ;;
    -*) refuse "$word: give an option of sbatch as --NAME=VALUE" ;;
  esac
  case $group,$word in
    *,--) group=$((group + 1)) ;;
    0,--array=*) array=$word ;;
    *,--array=*) refuse "$word: only prepare runs as an array" ;;
    *,--dependency=*) refuse "$word: the jobs depend on each other already" ;;
    0,*) prepare+=("$word") ;;
    1,hydra.run.dir=*) run=${word#*=} ;;
    1,*) train+=("$word") ;;
    2,*) evaluate+=("$word") ;;
    *) refuse "three groups of words, divided by -- twice" ;;
  esac
done

if [ -n "$array" ]; then
  submit select prepare.sbatch "${prepare[@]}" "source.steps=[select]"
else
  submit prepare prepare.sbatch "${prepare[@]}"
fi
if [ -z "$run" ]; then # named by the first job, whose number may have been an older one's
  named=outputs/slurm/chain-$before run=$named count=1
  while [ -e "$run" ]; do
    count=$((count + 1))
    run=$named-$count
  done
fi
if [ -n "$array" ]; then
  submit fetch prepare.sbatch "$array" "${prepare[@]}"
  submit summary prepare.sbatch "${prepare[@]}" "source.steps=[summary]"
fi
submit train train.sbatch "hydra.run.dir=$run" "${train[@]}"
submit evaluate evaluate.sbatch "checkpoint=$run" "${evaluate[@]}"
echo "run folder: $run"
echo "look: squeue --me    end them all: scancel ${submitted[*]}"
