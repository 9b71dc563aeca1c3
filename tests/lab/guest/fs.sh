#!/bin/sh
# fs.sh DEV MiB: mkfs.ext4, mount, copy files, unmount, compare after a remount, fsck -f. Says "FS clean" at the end.
set -e
dev=$1
mkfs.ext4 -q -F -E nodiscard "$dev"
mkdir -p /mnt/a
mount -t ext4 "$dev" /mnt/a
mkdir /mnt/a/files
i=0
while [ $i -lt "$2" ]; do
  head -c 1048576 /dev/urandom > /mnt/a/files/$i
  i=$((i + 1))
done
cp -r /bin/busybox /lab /mnt/a/files/
(cd /mnt/a/files && find . -type f -exec sha256sum {} + | sort > /tmp/sums)
umount /mnt/a
echo 3 > /proc/sys/vm/drop_caches
mount -t ext4 "$dev" /mnt/a
(cd /mnt/a/files && sha256sum -c /tmp/sums > /tmp/sums.out) || { grep -v OK /tmp/sums.out; echo "FS differs"; exit 1; }
echo "FS files $(wc -l < /tmp/sums)"
rm /mnt/a/files/0
fstrim -v /mnt/a
umount /mnt/a
e2fsck -f -n "$dev" 2>&1
echo "FS clean"
