#!/bin/sh
# build.sh BIN DIST: a source distribution of each member, and from that its wheel, in DIST. uv and the build backend are
# those of BIN, at the versions of constraints.txt: the same sources give the same bytes, and no network is needed.
set -eu
cd "$(dirname "$0")/.."
for member in core baselines integrations/*/; do
    "$1/uv" build --quiet --no-build-isolation --python "$1/python" --out-dir "$2" "$member"
done
