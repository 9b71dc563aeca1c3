# what: negative control: a flipped byte, a spoiled block and a lost write turn the verifiers red
# timeout: 150
img=$(image disk 64)
TOOLS=fio CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
step "a flipped byte in a file's data makes the checksums of fs.sh differ"
gm g "mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && yes ringback-lab | head -c 4000000 > /mnt/f && sha256sum /mnt/f > /tmp/sum && sync && echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /tmp/sum && umount /mnt"
off=$(strings -t d -n 12 "$img" | awk '$2 == "ringback-lab" && ++n == 2000 { print $1; exit }')
[ -n "$off" ] || fail "the file's data is not in the image"
flip() { printf 'X' | dd of="$img" bs=1 seek="$1" conv=notrunc,fsync 2> /dev/null; }
flip "$off"
gm g "echo 3 > /proc/sys/vm/drop_caches; mount -t ext4 /dev/xvda /mnt; sha256sum -c /tmp/sum && exit 9; umount /mnt"
step "a byte flipped between two checksums makes same_bytes fail"
(
  sha256sum() { flip 60000000; busybox sha256sum "$@"; }
  same_bytes g xvda "$img"
) && fail "same_bytes did not see the flipped byte"
rm -f $CTL/failed
step "fio sees a spoiled block"
gm g "sh /lab/fio.sh seq64k-d32 /dev/xvda"
gm g "sh /lab/fio.sh verify-only /dev/xvda"
dd if="$img" of=/scratch/old.img bs=64k skip=100 count=1 2> /dev/null
dd if=/dev/urandom of="$img" bs=1k seek=6410 count=1 conv=notrunc,fsync 2> /dev/null
g g "sh /lab/fio.sh verify-only /dev/xvda" && fail "fio did not see the spoiled block"
step "fio sees a lost write: a block as it was before the last round"
dd if=/dev/zero of=/scratch/old.img bs=64k count=1 2> /dev/null
gm g "sh /lab/fio.sh seq64k-d32 /dev/xvda"
dd if=/scratch/old.img of="$img" bs=64k seek=200 count=1 conv=notrunc,fsync 2> /dev/null
g g "sh /lab/fio.sh verify-only /dev/xvda" && fail "fio did not see the lost write"
guest_stop g
