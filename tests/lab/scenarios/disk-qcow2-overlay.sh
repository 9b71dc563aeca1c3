# what: a QCOW2 overlay over a golden image: both check clean, the bytes are right, the golden image is as it was
# timeout: 150
# needs: ringback
raw=$(image raw 96)
mkdir -p /scratch/golden && head -c 3000000 /dev/urandom > /scratch/golden/file
must mkfs.ext4 -q -F -d /scratch/golden "$raw"
wanted=$(sha /scratch/golden/file)
must qemu-img convert -f raw -O qcow2 "$raw" /scratch/golden.img
before=$(sha /scratch/golden.img)
must ringback disk create -f qcow2 -b golden.img -F qcow2 /scratch/overlay.img
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda qcow2:/scratch/overlay.img)
guest_start g
features g xvda 2
gm g "mkdir -p /mnt/a && mount -t ext4 /dev/xvda /mnt/a"
same "the golden image's file" "$wanted" "$(g g "sha256sum < /mnt/a/file" | grep -oE '^[0-9a-f]{64}')"
gm g "head -c 20000000 /dev/urandom > /mnt/a/new && cp /mnt/a/file /mnt/a/copy && rm /mnt/a/file && fstrim /mnt/a; umount /mnt/a"
! qemu-img check -q -f qcow2 /scratch/overlay.img 2> $CTL/lock.out || fail "qemu-img could open a served image"
grep -q 'lock' $CTL/lock.out || fail "qemu-img says something else: $(cat $CTL/lock.out)"
fs_round g /dev/xvda 8
image_bytes g xvda
guest_stop g
image_checks qcow2 /scratch/overlay.img
image_equals_guest qcow2 /scratch/overlay.img
same "the golden image" "$before" "$(sha /scratch/golden.img)"
rm -rf /scratch/golden
