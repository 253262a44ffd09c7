#!/bin/sh
# build_pycuda_for_tests.sh FOLDER [PYTHON]: compiles PyCUDA into FOLDER, for tests that run it on a stand-in driver.
#
# PyPI has its source alone. Neither a GPU nor a driver is needed: CUDA's headers are enough, and the driver's library is
# named when it is linked, not read. A minute or two on two cores, once.
# Says in one line what it did; exits 0 where something that it needs is missing, and 1 where the build fails.
set -u

folder=$1
python=${2:-python3}
source='pycuda==2026.1 --hash=sha256:759516160628ba06f32ce7e563e3f5b9214691dc9528a03ea99ea1073f4e14ba'

give_up() {
    echo "pycuda: $1"
    exit 0
}

# Those of the toolkit, else of the wheels that torch brings.
headers() {
    nvcc=$(command -v nvcc) && nvcc=$(dirname "$(readlink -f "$nvcc")")/..
    for include in "${nvcc:-/nonexistent}/include" /usr/local/cuda/include \
        "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"/nvidia/*/include; do
        [ -f "$include/cuda.h" ] && echo "$include" && return
    done
}

command -v flock >/dev/null 2>&1 || give_up "there is no flock; run: sudo apt-get install util-linux"
{ mkdir -p "$(dirname "$folder")" && exec 9>"$folder.lock"; } 2>/dev/null || give_up "$folder cannot be written"
flock 9 # one at a time; let go with the process

for module in "$folder"/pycuda/_driver*.so; do
    # Compiled for one version of Python.
    suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
    [ -f "$module" ] && [ "$(basename "$module")" = "_driver$suffix" ] && give_up "already in $folder"
done
command -v c++ >/dev/null 2>&1 || give_up "there is no C++ compiler; run: sudo apt-get install g++"
"$python" -m pip --version >/dev/null 2>&1 || give_up "$python has no pip, so it cannot be built"
include=$(headers)
[ -n "$include" ] || give_up "no cuda.h, neither of a toolkit nor of NVIDIA's wheels"

work=$(mktemp -d) || give_up "no temporary folder can be made"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
pip="$python -m pip --disable-pip-version-check --quiet"
echo "$source" >"$work/requirements.txt"
$pip download --no-deps --no-binary=:none: --no-binary=pycuda --require-hashes --retries 2 --timeout 15 \
    --dest "$work" --requirement "$work/requirements.txt" >"$work/log" 2>&1 ||
    give_up "its source cannot be fetched ($(grep '^ERROR:' "$work/log" | tail -n 1))"
mkdir "$work/source" "$work/stub"
tar --extract --file "$work"/pycuda-*.tar.gz --directory "$work/source" --strip-components 1
echo 'int cuInit(unsigned flags) { return (int)flags; }' |
    c++ -x c -shared -fPIC -Wl,-soname,libcuda.so.1 -o "$work/stub/libcuda.so" -
cat >"$work/source/siteconf.py" <<EOF
CUDA_INC_DIR = ["$include"]
CUDADRV_LIB_DIR = ["$work/stub"]
CUDA_ENABLE_CURAND = False
CXXFLAGS = ["-O1", "-w"]
EOF
# Optimised lightly and without debug information: it is compiled once and called a few hundred times.
CFLAGS=-g0 $pip wheel --no-deps --wheel-dir "$work/wheel" "$work/source" >"$work/log" 2>&1 &&
    $pip install --no-deps --target "$work/installed" "$work"/wheel/pycuda-*.whl >>"$work/log" 2>&1 || {
    cat "$work/log" >&2
    echo "pycuda: it does not build" >&2
    exit 1
}
{ mkdir -p "$(dirname "$folder")" && rm -rf "$folder" && mv "$work/installed" "$folder"; } 2>/dev/null ||
    give_up "$folder cannot be written"
echo "pycuda: built in $folder"
