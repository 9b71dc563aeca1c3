# what: the image grows while its file system is mounted
# timeout: 120
img=$(image disk 48)
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && head -c 8000000 /dev/urandom > /mnt/f && sha256sum /mnt/f > /tmp/sum && sync"
size_in_guest() { [ "$(g g 'cat /sys/block/xvda/size' | tail -n 1)" = "$1" ]; }
grow() { # MiB
  truncate -s "$1M" "$img"
  if [ "$BACKEND" = kernel ]; then # a loop device has to be told, and xen-blkback looks only when a request comes
    losetup -c "$(losetup -j "$img" | cut -d: -f1)"
    g g "dd if=/dev/xvda of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null"
  fi
}
grow 80
within "80 MiB in the guest" 1000 size_in_guest 163840
grow 96
[ "$BACKEND" = kernel ] || must ringback resize "$(xl domid g)/xvda"
within "96 MiB in the guest" 1000 size_in_guest 196608
same "sectors" 196608 "$(node "$(backend_node g xvda)/sectors")"
gm g "resize2fs /dev/xvda 2>&1"
gm g "head -c 50000000 /dev/urandom > /mnt/big && sha256sum /mnt/big >> /tmp/sum && sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /tmp/sum && umount /mnt"
same_bytes g xvda "$img"
guest_stop g
must e2fsck -fn "$img"
