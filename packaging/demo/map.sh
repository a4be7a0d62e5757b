#!/bin/bash
# map.sh URL FOLDER    draws docs/map.svg anew, as map.svg and map.png in FOLDER: what is cached of a Debian image (make demo makes one)
# after a few of its programs ran and wrote, on a volume in a store. For a machine, or a VM, that has ublk; as root.
set -euo pipefail
url=$1 out=$(realpath "$2") here=$(realpath "$(dirname "$0")/../..")
work=$(mktemp -d "${TMPDIR:-/var/tmp}/tierblk-map.XXXXXX")
tierblk() { (cd "$here" && "${PYTHON:-.venv/bin/python}" -m tierblk "$@"); }
clean() {
  set +e
  mountpoint -q "$work/root/proc" && umount "$work/root/proc"
  mountpoint -q "$work/root" && umount "$work/root"
  tierblk stop
  rm -rf "$work"
}
trap clean EXIT

mkdir "$work/root" "$work/store"
cat >"$work/web.toml" <<TOML
[device]
name = "web"
[base]
url = "$url"
[volume]
mode = "write-back"
url = "file://$work/store/web"
epoch_interval = "1h"
[cache]
dir = "$work/cache"
size = "1GiB"
TOML
device=$(tierblk attach "$work/web.toml")
mount "${device}p1" "$work/root"
mount -t proc proc "$work/root/proc"

run() { chroot "$work/root" /bin/sh -c "$1" >/dev/null 2>&1 || true; }
boot='systemctl --version; journalctl --version; udevadm --version; cat /boot/vmlinuz* /boot/initrd*; apt-cache stats; python3 -c "import ssl, json, asyncio"; perl -e "use POSIX"; ls -lR /etc /usr/bin'
run "$boot"
run 'mkdir -p /srv/db; dd if=/dev/urandom of=/srv/db/table bs=1M count=48; sync'
tierblk sync web --wait 2>/dev/null
run 'i=0; while [ $i -lt 40 ]; do dd if=/dev/urandom of=/srv/db/table bs=16k count=1 seek=$((i * 61)) conv=notrunc; i=$((i + 1)); done'
run 'dd if=/dev/urandom of=/srv/db/log bs=1M count=14; dd if=/dev/zero of=/srv/db/empty bs=1M count=24; sync'
for _ in 1 2; do
  echo 3 >/proc/sys/vm/drop_caches
  run 'apt-cache stats; python3 -c "import ssl"; head -c 20M /srv/db/table'
done
tierblk cache map web --svg "$out/map.svg" --png "$out/map.png"
tierblk cache map web
