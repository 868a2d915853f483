# shellcheck shell=bash
# Commands that are printed or run: what launch/tpu_vm.sh, launch/gke/gke.sh and launch/local.sh share. Sourced.
# `dry_run`, if it is not empty, prints every command, quoted for the shell, and runs none.
# `subcommand` is what `take_subcommand` found.
dry_run="${dry_run:-}" subcommand="${subcommand:-}"

# quote WORD...: the words as one line for the shell. Unlike printf %q it leaves a text of several lines readable.
quote() {
  local word rest quoted line="" apostrophe="'"
  for word in "$@"; do
    if [[ "$word" =~ ^[A-Za-z0-9_./:=@%+,-]+$ ]]; then
      quoted="$word"
    else
      quoted="'"
      rest="$word"
      while [[ "$rest" == *"$apostrophe"* ]]; do
        quoted+="${rest%%"$apostrophe"*}'\\''"
        rest="${rest#*"$apostrophe"}"
      done
      quoted+="$rest'"
    fi
    line+="${line:+ }$quoted"
  done
  printf '%s\n' "$line"
}

say() {
  if [[ -n "$dry_run" ]]; then
    echo "# $*"
  else
    echo "$*" >&2
  fi
}

# call WORD...: every command goes through here or `call_lines`, so that a dry run prints just what would be run.
call() {
  if [[ -n "$dry_run" ]]; then
    quote "$@"
  else
    "$@" </dev/null
  fi
}

call_lines() {
  if [[ -n "$dry_run" ]]; then
    printf '%s\n' "$1"
  else
    eval "$1"
  fi
}

# take_subcommand WORD: the script's `subcommand`, from a word that is none of its flags.
take_subcommand() {
  case "$1" in
    --config.* | --noconfig.*) fail "$1: values of the config come after a --, at the end: -- $1" ;;
    -*) fail "unknown flag $1; --help lists the flags, and flags of caprl_jax.main come after a --" ;;
  esac
  if [[ -n "$subcommand" ]]; then
    fail "unexpected argument $1 after the subcommand $subcommand; flags are written --flag=VALUE"
  fi
  subcommand="$1"
}

# check_secrets FILE: whether it holds lines NAME=VALUE and is readable by its owner alone.
check_secrets() {
  local line number=0
  [[ -f "$1" ]] || fail "--secrets=$1: there is no such file; write lines NAME=VALUE into one, and chmod 600 it"
  if [[ -n "$(find "$1" \( -perm -040 -o -perm -004 \) -print)" ]]; then
    fail "--secrets=$1 can be read by others; chmod 600 $1"
  fi
  while IFS= read -r line || [[ -n "$line" ]]; do
    number=$((number + 1))
    if [[ -n "$line" && "$line" != \#* && ! "$line" =~ ^[A-Za-z_][A-Za-z0-9_]*= ]]; then
      fail "--secrets=$1: line $number is not NAME=VALUE" # not shown: it may be a secret
    fi
  done <"$1"
}
