#!/bin/sh
# fetch_tensorrt_headers.sh [PYTHON]: puts TensorRT's headers under .cache/tensorrt-headers/, where the build looks for
# them.
#
# TensorRT's own wheels carry no headers, and its packages are outside Debian and Ubuntu. The wheel below carries
# NVIDIA's, under the Apache licence; a plugin compiled with them loads from TensorRT 10.0 on. Nothing is installed.
# A Jetson has headers of its own, which win.
# The build works without the headers, so this script always exits 0 and says in one line what it did.
set -u

python=${1:-python3}
wheel='kernel-lens==2.0.1 --hash=sha256:07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0'
header=NvInferRuntime.h
cache="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)/.cache/tensorrt-headers"

give_up() {
    echo "tensorrt headers: $1; the TensorRT plugin is skipped (or set TENSORRT_INCLUDE_DIR and install again)"
    exit 0
}

for folder in "${TENSORRT_INCLUDE_DIR:-/nonexistent}" /usr/include "/usr/include/$(uname -m)-linux-gnu" /usr/local/include; do
    if [ -f "$folder/$header" ]; then
        echo "tensorrt headers: this machine has them"
        exit 0
    fi
done
if [ -f "$cache/$header" ]; then
    echo "tensorrt headers: already in $cache"
    exit 0
fi
"$python" -m pip --version >/dev/null 2>&1 || give_up "$python has no pip, so they cannot be fetched"

work=$(mktemp -d) || give_up "no temporary folder can be made"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
echo "$wheel" >"$work/requirements.txt"
"$python" -m pip --disable-pip-version-check --quiet download --no-deps --require-hashes --only-binary=:all: \
    --retries 2 --timeout 15 --dest "$work" --requirement "$work/requirements.txt" >"$work/log" 2>&1 ||
    give_up "the wheel that has them cannot be fetched ($(grep '^ERROR:' "$work/log" | tail -n 1))"
"$python" -m zipfile -e "$work"/kernel_lens-*.whl "$work/unpacked" || give_up "the wheel that has them cannot be read"
# The wheel adds a header of its own; NVIDIA's say what they are.
mkdir -p "$work/headers"
grep -l 'SPDX-License-Identifier: Apache-2.0' "$work"/unpacked/kernel_lens/include/tensorrt/NvInfer*.h |
    while read -r file; do cp "$file" "$work/headers"; done
[ -f "$work/headers/$header" ] || give_up "the wheel that has them has changed"
{ mkdir -p "$(dirname "$cache")" && rm -rf "$cache" && mv "$work/headers" "$cache"; } 2>/dev/null ||
    give_up "$cache cannot be written"
echo "tensorrt headers: fetched into $cache"
