#!/bin/sh
# Puts ONNX Runtime's C and C++ headers under .cache/onnxruntime-headers/, where the build looks for them.
#
# Wheels of onnxruntime carry no headers; Debian's libonnxruntime-dev does (since trixie), Ubuntu's since 25.04.
# Nothing is installed and root is not needed: apt runs on private directories, with the mirrors of this machine.
# The build works without the headers, so this script always exits 0 and says in one line what it did.
set -u

header=onnxruntime_cxx_api.h
cache="$(CDPATH='' cd -- "$(dirname -- "$0")/.." && pwd)/.cache/onnxruntime-headers"

headers_in() {
    for folder in "$1" "$1/onnxruntime" "$1/onnxruntime/core/session"; do
        [ -f "$folder/$header" ] && return 0
    done
    return 1
}

give_up() {
    echo "onnxruntime headers: $1; the scoring kernel is skipped and the function body inside each model is used" \
        "(or set ONNXRUNTIME_INCLUDE_DIR and install again)"
    exit 0
}

# The mirrors this machine already uses, its own release first: apt names the files it would update from.
mirrors() {
    apt-get update --print-uris 2>/dev/null | sed -n "s|^'\([^']*\)/dists/$1/InRelease' .*|\1|p" | awk '!seen[$0]++'
}

# One attempt: the package of release $2 from mirror $1, unpacked into the private folder $work.
fetch() {
    echo "deb $signed_by $1 $2 $components" >"$work/sources.list"
    apt_get update && (cd "$work" && apt_get download libonnxruntime-dev) || return 1
    dpkg-deb --extract "$work"/libonnxruntime-dev_*.deb "$work/unpacked" && headers_in "$work/unpacked/usr/include"
}

apt_get() {
    apt-get --quiet=2 -o Dir::Etc::SourceList="$work/sources.list" -o Dir::Etc::SourceParts=- \
        -o Dir::State="$work/state" -o Dir::State::Lists="$work/lists" -o Dir::State::Status="$work/status" \
        -o Dir::Cache="$work/cache" -o APT::Sandbox::User= -o Acquire::Languages=none -o Acquire::Retries=2 \
        "$@" >>"$work/log" 2>&1
}

if headers_in "${ONNXRUNTIME_INCLUDE_DIR:-/nonexistent}" || headers_in /usr/include || headers_in /usr/local/include; then
    echo "onnxruntime headers: this machine has them"
    exit 0
fi
if headers_in "$cache"; then
    echo "onnxruntime headers: already in $cache"
    exit 0
fi
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null 2>&1 || give_up "$tool is not on this machine, so they cannot be fetched"
done

distribution=$(. /etc/os-release 2>/dev/null && echo "${ID:-} ${ID_LIKE:-}")
codename=$(. /etc/os-release 2>/dev/null && echo "${UBUNTU_CODENAME:-${VERSION_CODENAME:-}}")
case " $distribution " in
*" ubuntu "*) release=$codename components="main universe" keyring=/usr/share/keyrings/ubuntu-archive-keyring.gpg ;;
*" debian "*) release=trixie components=main keyring=/usr/share/keyrings/debian-archive-keyring.gpg ;;
*) give_up "this machine is neither Debian nor Ubuntu" ;;
esac
signed_by=
[ -f "$keyring" ] && signed_by="[signed-by=$keyring]"

work=$(mktemp -d) || give_up "no temporary folder can be made"
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
mkdir -p "$work/state" "$work/lists/partial" "$work/cache/archives/partial"
: >"$work/status"

found=$(mirrors "$codename")
[ -n "$found" ] || found=$(mirrors '[a-z]*')
[ -n "$found" ] || give_up "apt has no mirror configured"
for mirror in $found; do
    if fetch "$mirror" "$release"; then
        { mkdir -p "$(dirname "$cache")" && rm -rf "$cache" && mv "$work/unpacked/usr/include" "$cache"; } 2>/dev/null ||
            give_up "$cache cannot be written"
        echo "onnxruntime headers: fetched into $cache"
        exit 0
    fi
done
give_up "no mirror of this machine has libonnxruntime-dev for $release ($(grep -m 1 '^[EW]:' "$work/log" || echo 'no answer'))"
