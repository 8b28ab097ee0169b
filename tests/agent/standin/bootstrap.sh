#!/bin/sh
# Starts the agent in the background and the user's command, and ends with the command's exit code.
# Of our own, by the table of the agent's contract. Uses builtins only: the sandbox's image may hold no tools.

EXECD=${EXECD:-/opt/opensandbox/execd}
EXECD_ENVS=${EXECD_ENVS:-/opt/opensandbox/.env}
export EXECD_ENVS
[ -e "$EXECD_ENVS" ] || ( : > "$EXECD_ENVS" ) 2>/dev/null || echo "warning: cannot write $EXECD_ENVS" >&2

# EXECD may have arguments ("execd -port N"). The stand-in agent is a folder.
agent=$EXECD
folder=${EXECD%% *}
[ -d "$folder" ] && agent="$folder/execd${EXECD#"$folder"}"

if [ -n "${EXECD_BOOTSTRAP_PRE_SCRIPT:-}" ] && [ -f "$EXECD_BOOTSTRAP_PRE_SCRIPT" ]; then
    . "$EXECD_BOOTSTRAP_PRE_SCRIPT"
fi

shell=${BOOTSTRAP_SHELL:-}
if [ -z "$shell" ]; then
    if command -v bash > /dev/null 2>&1; then shell=bash; else shell=sh; fi
fi
if [ -n "${BOOTSTRAP_CMD:-}" ]; then
    set -- "$shell" -c "$BOOTSTRAP_CMD"
elif [ "${1:-}" = -c ]; then
    shift
    set -- "$shell" -c "$*"
fi

if [ "${EXECD_INIT:-}" = 1 ]; then
    exec $agent --init "$@"
fi

command=
on_signal() {
    if [ -n "$command" ]; then
        kill -TERM "$command" 2> /dev/null
        wait "$command"
    fi
    exit 0
}
trap on_signal TERM INT

$agent &
"$@" &
command=$!
wait "$command"
exit $?
