# shellcheck shell=bash
# What the cluster launchers share; sourced by them. Each runs one command,
# given after `--`, and runs it again when it was preempted:
#
#   --max_restarts=N   at most so many times
#   --pause=SECONDS    and not before so long
#   --dry_run          print what would be run, and run nothing
#
# Exit codes of a launcher: 0 the command is done; 2 a flag is wrong; else what
# the command last ended with. A command is run again after
#
#   75    told to stop and saved, or lost another process (ma_rlhf_jax.train)
#   134   ended by jax, which lost another process
#   137   SIGKILL: preempted, or out of memory of the host
#   143   SIGTERM before it was ready to save
#   255   ssh lost the connection
#
# and after nothing else: other codes tell of errors that would come again.

# shellcheck source=launch/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

say() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
}

# Runs a command; with --dry_run prints it instead.
run() {
  if ((dry_run)); then
    quoted "$@"
  else
    "$@"
  fi
}

# Prints a command as one line that a shell reads back.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ "$word" == *\'* ]]; then
      printf -v word %q "$word"
    elif ! [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then
      word="'$word'"
    fi
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

# Dies unless the value $2 of the flag $1 is a whole number from $3 to $4, which
# may be left out.
check_number() {
  local most="${4:-999999999}" # so many digits are no overflow
  if ! [[ "$2" =~ ^[0-9]{1,9}$ ]] || ((10#$2 < $3 || 10#$2 > most)); then
    die "$1=$2: give a whole number from $3 to $most"
  fi
}

# Dies unless the value $2 of the flag $1 is a name; $3 is an example.
check_name() {
  [[ "$2" =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] \
    || die "$1=$2: give a name of letters, digits and ._-, for example $1=$3"
}

# Dies unless there is a command, which follows `--`.
check_command() {
  (($#)) || die "no command: end the line with -- python -m ma_rlhf_jax.train" \
    '--config=configs/hh_7b.py --workdir=DIR'
}

# Takes the flags that all launchers have; false where $1 is none of them.
shared_flag() {
  case "$1" in
    --max_restarts=*) max_restarts="${1#*=}" ;;
    --pause=*) pause="${1#*=}" ;;
    --dry_run) dry_run=1 ;;
    *) return 1 ;;
  esac
}

unknown_flag() {
  die "$1: no such flag; --help lists them. The command and its own flags" \
    'follow --'
}

check_shared() {
  check_number --max_restarts "$max_restarts" 0
  check_number --pause "$pause" 0
}

# Whether a command that ended with the code $1 goes on when it is run again.
goes_on() {
  case "$1" in
    75 | 134 | 137 | 143 | 255) return 0 ;;
    *) return 1 ;;
  esac
}

# Runs the function "$@" again and again while its code says so; $stopping is
# set where the user has asked to stop.
with_restarts() {
  local code restarts=0
  while true; do
    code=0
    "$@" || code=$?
    if ((code == 0 || stopping)) || ! goes_on "$code"; then
      return "$code"
    fi
    if ((restarts >= max_restarts)); then
      say "ended with $code; no restart is left of --max_restarts=$max_restarts"
      return "$code"
    fi
    restarts=$((restarts + 1))
    say "ended with $code; restart $restarts of $max_restarts in $pause s"
    sleep "$pause"
  done
}

# The defaults.
max_restarts=10
pause=60
dry_run=0
stopping=0
