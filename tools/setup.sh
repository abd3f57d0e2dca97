#!/bin/sh
# Makes .venv, or mends it, and installs the workspace at the versions of constraints.txt.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
stamp=.venv/.installed

fail() {
    printf '\nsetup: %s\n' "$1" >&2
    exit 1
}

is_pinned() { # whether the pinned versions are for this Python
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

is_pinned "$python" ||
    fail "'$python' is not Python 3.11, 3.12 or 3.13, which the pinned versions are for. Install one of these, or name it: make PYTHON=python3.12 ..."

# An interrupted run may have left a .venv without a working pip, and an earlier version one of a Python without wheels.
if ! is_pinned .venv/bin/python || ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    echo "setup: making .venv with $("$python" --version)"
    rm -rf .venv
    "$python" -m venv .venv || fail "'$python -m venv' failed. On Debian and Ubuntu: apt install python3-venv"
fi

pins=$(mktemp) # without what the documentation alone needs: `make docs` has a place of its own
trap 'rm -f "$pins"' EXIT
sed -n 's/^[a-z].*/^&==/p' docs/requirements.txt | grep -v -f - constraints.txt | grep -v '^box2d==' >"$pins"

inputs=$(cat "$pins" core/pyproject.toml baselines/pyproject.toml integrations/*/pyproject.toml tests/requirements.txt | cksum)
[ "$(cat "$stamp" 2>/dev/null || true)" = "$inputs" ] && exit 0

echo "setup: installing into .venv (once, some minutes and 4 GB)"
pip() {
    .venv/bin/python -m pip install --disable-pip-version-check "$@" ||
        fail "installation failed, see above. Is the package registry reachable? The same command continues."
}
set -- -e core -e baselines
for member in integrations/*/pyproject.toml; do
    set -- "$@" -e "${member%/pyproject.toml}"
done
# Without dependencies: the pins are all that is needed, and some hosts ask for what they must not get
# (tools/overrides.txt).
pip --no-deps -r "$pins"
pip --no-deps "$@"
# One game of one baseline, which some machines have no wheel for.
.venv/bin/python -m pip install --disable-pip-version-check --no-deps --only-binary=:all: -c constraints.txt box2d ||
    echo "setup: without box2d, and so without the preset lunarlander of the baseline dqn"
echo "$inputs" >"$stamp"
