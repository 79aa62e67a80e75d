# shellcheck shell=bash
# The help of the launch scripts; sourced by them.

# Ends the script with its help, which is the comment at its top, where one of
# the words "$@", up to `--`, asks for it.
answer_help() {
  local word
  for word in "$@"; do
    case "$word" in
      --) return ;;
      -h | --help)
        awk 'NR > 1 { if (!/^#( |$)/) exit; sub(/^# ?/, ""); print }' "$0"
        exit 0
        ;;
    esac
  done
}
