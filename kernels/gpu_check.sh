#!/usr/bin/env bash
# Builds the CUDA kernels on this machine, checks them against the definition, under compute-sanitizer where it is
# installed, times them beside what the device could do, and writes what it saw to a file.
#
#   kernels/gpu_check.sh [REPORT]        default: gpu_check.md
#
# Needs nvcc and a CUDA device. Runs the tests marked gpu, too, where .venv has PyTorch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
report=$(realpath -m "${1:-gpu_check.md}")
nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc) || {
  echo "gpu_check: nvcc is not found; install the CUDA toolkit or put its bin folder into PATH" >&2
  exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "building for the device of this machine"
sources=(kernels/gpu_check.cu kernels/cuda/patch_entropy.cu kernels/cuda/preprocess.cu)
"$nvcc" -std=c++17 -O3 -arch=native -lineinfo "${sources[@]}" -o "$work/gpu_check" 2>"$work/nvcc.log" ||
  # Without a device nvcc cannot know its architecture, and the program says that there is none; devices before sm_80
  # are too old, and it says that.
  "$nvcc" -std=c++17 -O3 -arch=compute_80 "${sources[@]}" -o "$work/gpu_check"

echo "checking and timing"
status=0
"$work/gpu_check" >"$work/report.md" || status=$?
cat "$work/report.md"
[ "$status" -le 1 ] || exit "$status"

{
  cat "$work/report.md"
  printf '\n## Sanitizers\n\n'
  if sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer); then
    for tool in memcheck racecheck synccheck initcheck; do
      if "$sanitizer" --tool "$tool" --error-exitcode 9 "$work/gpu_check" --check >"$work/$tool.log" 2>&1; then
        echo "* $tool: nothing found"
      else
        echo "* $tool: **found**: $(grep -m1 '=========.*\(Error\|error\|hazard\)' "$work/$tool.log" || echo 'see its own output')"
        status=1
      fi
    done
  else
    echo "compute-sanitizer is not installed: not run"
  fi
  printf '\n## Tests marked gpu\n\n'
  if [ -x .venv/bin/pytest ] && .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    .venv/bin/pytest -q -m gpu >"$work/pytest.log" 2>&1 || status=1
    tail -n 1 "$work/pytest.log"
  else
    echo "no PyTorch with CUDA in .venv: not run"
  fi
  printf '\n%s, commit %s, command: kernels/gpu_check.sh\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "$(git describe --always --dirty 2>/dev/null || echo unknown)"
} >"$report"
echo "written to $report"
exit "$status"
