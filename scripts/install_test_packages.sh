#!/usr/bin/env bash
# System packages the tests use: compilers for the kernel, an emulator for its aarch64 build and what makes a root file
# system for it, an SSH server to flash over, an RTSP server (GStreamer through the system's Python), a network that loses
# packets (nftables), a clock that can be set (faketime), an MQTT broker, and a browser for the page.
# As root they are installed; otherwise the tests that need them skip, and this says how to get them.
set -euo pipefail
packages=(
  chromium
  cmake
  debian-archive-keyring
  g++
  g++-aarch64-linux-gnu
  gir1.2-gst-plugins-base-1.0
  gir1.2-gst-rtsp-server-1.0
  gstreamer1.0-plugins-bad
  gstreamer1.0-plugins-base
  gstreamer1.0-plugins-good
  gstreamer1.0-plugins-ugly
  iproute2
  libfaketime
  mmdebstrap
  nftables
  python3-gi
  qemu-user-static
)
# A running systemd would start these servers at once: there the owner installs them.
[ -d /run/systemd/system ] || packages+=(mosquitto openssh-server)
command -v dpkg-query >/dev/null || { echo "not a Debian or Ubuntu system: tests that need ${packages[*]} will skip"; exit 0; }
missing=()
for package in "${packages[@]}"; do
  dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
  echo "tests that need these packages will skip; to run them: sudo apt-get install ${missing[*]}"
  exit 0
fi
echo "installing system packages for the tests: ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || { echo "no package index can be reached: tests that need them will skip"; exit 0; }
# One at a time if the set fails: a name that this release lacks must not cost the others.
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null ||
  for package in "${missing[@]}"; do
    apt-get install -y -qq --no-install-recommends "$package" >/dev/null || echo "not available here: $package"
  done
