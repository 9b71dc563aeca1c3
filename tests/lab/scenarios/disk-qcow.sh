# what: a QCOW2 overlay over an image of QCOW version 1, which the guest reads through
# needs: ringback
# timeout: 150
raw=$(image raw 64)
mkdir -p /scratch/old && head -c 3000000 /dev/urandom > /scratch/old/file
must mkfs.ext4 -q -F -d /scratch/old "$raw"
wanted=$(sha /scratch/old/file)
must qemu-img convert -f raw -O qcow "$raw" /scratch/old.img
before=$(sha /scratch/old.img)
must ringback disk create -f qcow2 -b old.img -F qcow /scratch/new.img
CMDLINE=$BLKFRONT DISK1=$(disk xvda qcow2:/scratch/new.img)
guest_start g
gm g "mkdir -p /mnt/a && mount -t ext4 /dev/xvda /mnt/a"
same "the old image's file" "$wanted" "$(g g "sha256sum < /mnt/a/file" | grep -oE '^[0-9a-f]{64}')"
gm g "cp /mnt/a/file /mnt/a/copy; umount /mnt/a"
image_bytes g xvda
guest_stop g
image_checks qcow2 /scratch/new.img
image_equals_guest qcow2 /scratch/new.img
same "the old image" "$before" "$(sha /scratch/old.img)"
rm -rf /scratch/old
