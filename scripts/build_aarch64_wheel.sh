#!/bin/sh
# build_aarch64_wheel.sh FOLDER [PYTHON]: cross-compiles the wheel for 64-bit ARM, such as a Jetson, into FOLDER.
#
# The tag says what the oldest device has: JetPack 6 is Ubuntu 22.04 with glibc 2.35. It has the kernels for the CPU;
# those for the GPU are compiled on the device, for its own CUDA. Equal sources give equal bytes.
# Says in one line what it did; exits 0 where something that it needs is missing, and 1 where the build fails.
set -u

root="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
folder=$1
python=${2:-python3}

give_up() {
    echo "aarch64 wheel: $1"
    exit 0
}

command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 ||
    give_up "there is no cross compiler; run: sudo apt-get install g++-aarch64-linux-gnu"
"$python" -m pip --version >/dev/null 2>&1 || give_up "$python has no pip, so it cannot be built"
headers=$("$root/scripts/fetch_onnxruntime_headers.sh")
case $headers in *skipped*) give_up "$headers" ;; esac

work=$(mktemp -d) || give_up "no temporary folder can be made"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
export SOURCE_DATE_EPOCH=315532800 # 1980, the first time that an archive can hold
export _PYTHON_HOST_PLATFORM=manylinux_2_35_aarch64
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir "$work/wheel" \
    --config-settings build-dir="$work/build" \
    --config-settings cmake.define.CMAKE_TOOLCHAIN_FILE="$root/cmake/aarch64-linux-gnu.cmake" \
    --config-settings cmake.define.MELIAD_CUDA=OFF "$root" >"$work/log" 2>&1 || {
    cat "$work/log" >&2
    echo "aarch64 wheel: it does not build" >&2
    exit 1
}
{ mkdir -p "$folder" && mv "$work"/wheel/*.whl "$folder"; } 2>/dev/null || give_up "$folder cannot be written"
echo "aarch64 wheel: built in $folder"
