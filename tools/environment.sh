# shellcheck shell=bash disable=SC2154
# Sourced by setup_env.sh and setup_sglang.sh: what making a virtual environment in steps takes.
#
# Expects: speaker (the name in front of each line), venv (where the environment lives), constraints (set before the
# first install). Sets: state (the file that holds "installing", or the fingerprint of a finished set-up), log.

state=$venv/.klear-state
log=$venv/setup.log
ticker=

say() { echo "$speaker: $*"; }

fail() {
    echo "$speaker: $*" >&2
    exit 1
}

usable() {
    # A shim on PATH may exist and not run; Debian's python3 may lack venv and pip.
    "$1" -c 'import sys, ssl, sqlite3, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
        >/dev/null 2>&1
}

find_python() {
    local candidate
    if [[ -n ${KLEAR_PYTHON:-} ]]; then
        usable "$KLEAR_PYTHON" || fail "KLEAR_PYTHON=$KLEAR_PYTHON is not a Python 3.11 or 3.12 with venv and pip"
        echo "$KLEAR_PYTHON"
        return
    fi
    for candidate in python3.11 python3.12 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[12].*/bin/python3 /usr/local/bin/python3.1[12] /usr/bin/python3.1[12]; do
        if command -v "$candidate" >/dev/null && usable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no working Python 3.11 or 3.12 (with the venv and ensurepip modules; on Debian: apt install python3-venv)." \
        "Install one, or name it in KLEAR_PYTHON."
}

# digest < FACTS: one line that changes when they do.
digest() { { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1; }

stop_ticker() {
    if [[ -n $ticker ]]; then
        kill "$ticker" 2>/dev/null || true
        wait "$ticker" 2>/dev/null || true
        ticker=
    fi
}
trap stop_ticker EXIT

# step TEXT COMMAND...: run it with its output in the log and a sign of life every half minute.
step() {
    local text=$1 start=$SECONDS
    shift
    say "$text"
    # A sleep left behind must hold neither the lock nor the output that a caller may be reading to its end.
    (while sleep 30 >/dev/null 2>&1; do echo "$speaker:   ... $((SECONDS - start)) s"; done) 9>&- &
    ticker=$!
    if ! "$@" >>"$log" 2>&1; then
        stop_ticker
        tail -n 25 "$log" >&2
        fail "this step failed: $text (all of its output: $log)"
    fi
    stop_ticker
}

pip_install() { "$venv/bin/python" -m pip install --no-input --disable-pip-version-check -c "$constraints" "$@"; }

# hold_directory SETTING: make the directory, refuse one that is something else, and keep other set-ups out of it.
hold_directory() {
    mkdir -p "$venv"
    if [[ ! -f $venv/pyvenv.cfg && ! -f $state && -n $(find "$venv" -mindepth 1 ! -name .klear-lock -print -quit) ]]; then
        fail "$venv holds something that is no virtual environment; remove it or set $1"
    fi
    # Two commands started together: the second waits for the first.
    if command -v flock >/dev/null; then
        exec 9>"$venv/.klear-lock"
        flock --nonblock 9 || { say "waiting for another set-up of $venv"; flock 9; }
    fi
}

up_to_date() { [[ -f $state && -x $venv/bin/python && $(<"$state") == "$(fingerprint)" ]]; }

empty_directory() { find "$venv" -mindepth 1 -maxdepth 1 ! -name .klear-lock -exec rm -rf {} +; }
