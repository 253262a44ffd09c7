#!/bin/sh
# make_aarch64_root.sh FOLDER [PYTHON]: makes a root file system of 64-bit ARM with what our wheel depends on, and lets
# this machine execute its programs under emulation.
#
# It is Debian 12 with an SSH server: of a Jetson's system it has the processor's instructions and the libraries, not
# the GPU. It is made again when this script or the dependencies change, and moved to FOLDER only when it is whole.
# Needs root, on Debian or Ubuntu. Exits 0 and says in one line what it did, or why there is no such root.
set -u

here="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)"
folder=$1
python=${2:-python3}
recipe=etc/meliad-edge-root # inside FOLDER: what it was made from
packages='python3,python3-venv,openssh-server,libgomp1,libstdc++6'
site_packages=usr/local/lib/python3.11/dist-packages

give_up() {
    echo "aarch64 root: $1"
    exit 0
}

# The kernel executes aarch64 programs with the emulator, which it opens now: later, in the root, it is out of reach.
register_emulator() {
    binfmt=/proc/sys/fs/binfmt_misc
    [ -e "$binfmt/register" ] || mount -t binfmt_misc binfmt_misc "$binfmt" 2>/dev/null || return
    [ -e "$binfmt/qemu-aarch64" ] && return
    magic='\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00'
    mask='\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff'
    cat >"$binfmt/register" 2>/dev/null <<EOF
:qemu-aarch64:M::$magic:$mask:$(command -v qemu-aarch64-static):OCF
EOF
}

if [ -e "$folder" ] && [ ! -e "$folder/$recipe" ]; then
    give_up "$folder is something else; name a folder that is not there"
fi
[ "$(id -u)" = 0 ] || give_up "only root can make and enter it"
for tool in mmdebstrap qemu-aarch64-static flock; do
    command -v "$tool" >/dev/null 2>&1 || give_up "$tool is not on this machine; run: scripts/install_test_packages.sh"
done
register_emulator || give_up "this kernel does not let $(command -v qemu-aarch64-static) be registered in binfmt_misc"

{ mkdir -p "$(dirname "$folder")" && exec 9>"$folder.lock"; } || give_up "$folder cannot be written"
flock 9 # one at a time; let go with the process
requirements=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)",$/\1/p' "$here/pyproject.toml")
wanted=$(printf '%s\n' "$requirements" | cat "$here/scripts/make_aarch64_root.sh" - | sha256sum)
if [ "$wanted" = "$(cat "$folder/$recipe" 2>/dev/null)" ]; then
    echo "aarch64 root: already in $folder"
    exit 0
fi

"$python" -m pip --version >/dev/null 2>&1 || give_up "$python has no pip, so the dependencies cannot be fetched"
work=$folder.part
rm -rf --one-file-system "$work" # of one that was killed
trap 'rm -rf --one-file-system "$work"' EXIT
trap 'exit 130' INT TERM
log=$folder.log
# What it mounts is private to it, and gone with it.
unshare --mount mmdebstrap --quiet --architectures=arm64 --variant=extract --include='?essential' \
    --include="$packages" --hook-dir=/usr/share/mmdebstrap/hooks/merged-usr bookworm "$work" >"$log" 2>&1 ||
    give_up "Debian cannot be fetched: $(tail -n 1 "$log")"
printf '%s\n' "$requirements" >"$work/tmp/requirements.txt"
"$python" -m pip --disable-pip-version-check install --quiet --only-binary=:all: --implementation cp \
    --python-version 3.11 --platform manylinux_2_35_aarch64 --platform manylinux_2_34_aarch64 \
    --platform manylinux_2_31_aarch64 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux2014_aarch64 --target "$work/$site_packages" -r "$work/tmp/requirements.txt" >"$log" 2>&1 ||
    give_up "the wheels of the dependencies cannot be fetched: $(grep -m 1 '^ERROR:' "$log")"

# What the packages' own scripts would have done: those were not run.
rm -rf "$work/$site_packages/bin" # for the Python of this machine
cp "$work/usr/share/base-passwd/passwd.master" "$work/etc/passwd"
cp "$work/usr/share/base-passwd/group.master" "$work/etc/group"
echo 'sshd:*:100:65534::/run/sshd:/usr/sbin/nologin' >>"$work/etc/passwd"
cp "$work/usr/share/openssh/sshd_config" "$work/etc/ssh"
mkdir -p "$work/run/sshd"
echo edge-device >"$work/etc/hostname"

# The emulated processor, where programs look for it: /proc/cpuinfo and /sys of this machine tell of another one.
cpus=$work/sys/devices/system/cpu
mkdir -p "$cpus"
last=$(($(getconf _NPROCESSORS_ONLN) - 1))
echo "0-$last" | tee "$cpus/possible" "$cpus/present" "$cpus/online" >/dev/null
for processor in $(seq 0 "$last"); do
    cat <<EOF
processor	: $processor
BogoMIPS	: 62.50
Features	: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x4
CPU part	: 0xd0b
CPU revision	: 1

EOF
done >"$work/etc/cpuinfo"
chroot "$work" ssh-keygen -A >"$log" 2>&1 || give_up "its programs do not run: $(tail -n 1 "$log")"
echo "$wanted" >"$work/$recipe"
{ rm -rf --one-file-system "$folder" && mv "$work" "$folder"; } || give_up "$folder cannot be written"
rm -f "$log"
echo "aarch64 root: made in $folder"
