#!/bin/sh
# fetch_triton_for_tests.sh FOLDER [PYTHON]: NVIDIA's Triton server with its Python backend, for tests.
#
# PyPI has it inside the wheel of PyTriton, 55 MB, for 64-bit x86 and glibc 2.35 or newer; it needs no GPU. The backend
# for ONNX Runtime is in NVIDIA's containers alone.
# Says in one line what it did; exits 0 where something that it needs is missing.
set -u

folder=$1
python=${2:-python3}
wheel='nvidia-pytriton==0.7.0 --hash=sha256:21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df'

give_up() {
    echo "triton: $1"
    exit 0
}

version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
server=$folder/pytriton/tritonserver
[ -x "$server/bin/tritonserver" ] && [ -f "$server/python_backend_stubs/$version/triton_python_backend_stub" ] &&
    give_up "already in $folder"
"$python" -m pip --version >/dev/null 2>&1 || give_up "$python has no pip, so it cannot be fetched"

work=$(mktemp -d) || give_up "no temporary folder can be made"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
echo "$wheel" >"$work/requirements.txt"
"$python" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: --require-hashes \
    --retries 2 --timeout 15 --dest "$work" --requirement "$work/requirements.txt" >"$work/log" 2>&1 ||
    give_up "its wheel cannot be fetched ($(grep '^ERROR:' "$work/log" | tail -n 1))"
"$python" -m zipfile --extract "$work"/nvidia_pytriton-*.whl "$work/unpacked" || give_up "its wheel cannot be unpacked"
[ -f "$work/unpacked/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" ] ||
    give_up "its Python backend is not for Python $version"
chmod +x "$work/unpacked/pytriton/tritonserver/bin/tritonserver" \
    "$work/unpacked/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub"
{ mkdir -p "$(dirname "$folder")" && rm -rf "$folder" && mv "$work/unpacked" "$folder"; } 2>/dev/null ||
    give_up "$folder cannot be written"
echo "triton: unpacked in $folder"
