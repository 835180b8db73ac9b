#!/bin/sh
# Runs a step of the set-up with one line on the terminal: what it does and how long it took. What the command says is
# appended to LOG, and the end of it is shown if the command fails.
#
#     sh scripts/quietly.sh LOG "what it does" COMMAND ...
log=$1
what=$2
shift 2
printf '%s ... ' "$what"
start=$(date +%s)
first=$(($(cat "$log" 2>/dev/null | wc -l) + 1))
"$@" >>"$log" 2>&1
status=$?
if [ $status -eq 0 ]; then
    printf 'done in %s s\n' $(($(date +%s) - start))
else
    printf 'failed after %s s; the end of %s:\n\n' $(($(date +%s) - start)) "$log"
    # pip warns of every place of a package index that is not there; that is never why it failed
    tail -n "+$first" "$log" | grep -v 'WARNING: Location .* is ignored' | tail -n 40
fi
exit $status
