#!/bin/sh
# run_in_aarch64_root.sh ROOT CHANGES COMMAND [ARGUMENT...]: runs a command in the root that make_aarch64_root.sh made.
#
# ROOT stays as it is: what the command writes is kept under CHANGES/files, which is read again next time. So one root
# serves many devices, each with a CHANGES of its own, where one command runs at a time. The mounts are the command's
# own and are gone with it. /sys and /proc/cpuinfo are the root's: the host's tell of another processor, on which ONNX
# Runtime crashes. The emulated one is the emulator's nearest to the Cortex-A78AE of a Jetson Orin.
# Stop it with SIGKILL, which reaches the command: other signals do not.
# Exits as the command does, or with 125 and a line where this machine cannot mount.
set -eu

if [ "${1-}" != --mounting ]; then
    mkdir -p "$2/files" "$2/work" "$2/root"
    exec unshare --mount --pid --fork --kill-child -- "$0" --mounting "$@"
fi
shift
lower=$1 changes=$2
shift 2
{
    mount -t overlay -o "lowerdir=$lower,upperdir=$changes/files,workdir=$changes/work" overlay "$changes/root" &&
        mount -t proc proc "$changes/root/proc" &&
        mount --bind "$changes/root/etc/cpuinfo" "$changes/root/proc/cpuinfo"
} || {
    echo "aarch64 root: it cannot be mounted at $changes/root" >&2
    exit 125
}
export QEMU_CPU=cortex-a76
exec chroot "$changes/root" "$@"
