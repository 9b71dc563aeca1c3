# what: an image with internal snapshots: the guest writes over them, and each still has its bytes
# timeout: 150
# needs: ringback
raw=$(image raw 64)
head -c 40000000 /dev/urandom | dd of="$raw" conv=notrunc 2> /dev/null
must qemu-img convert -f raw -O qcow2 "$raw" /scratch/snap.img
first=$(sha "$raw")
must ringback disk snapshot create -f qcow2 /scratch/snap.img one
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda qcow2:/scratch/snap.img)
guest_start g
fs_round g /dev/xvda 8
image_bytes g xvda
guest_stop g
image_checks qcow2 /scratch/snap.img
image_equals_guest qcow2 /scratch/snap.img
must qemu-img snapshot -c two /scratch/snap.img
second=$(cat $CTL/guest.sha)
guest_start h
gm h "dd if=/dev/urandom of=/dev/xvda bs=1M count=20 conv=fsync"
guest_stop h
image_checks qcow2 /scratch/snap.img
must ringback disk snapshot apply -f qcow2 /scratch/snap.img one
must qemu-img convert -f qcow2 -O raw /scratch/snap.img "$raw"
same "the first snapshot" "$first" "$(sha "$raw")"
must ringback disk snapshot apply -f qcow2 /scratch/snap.img two
must qemu-img convert -f qcow2 -O raw /scratch/snap.img "$raw"
same "the second snapshot" "$second" "$(sha "$raw")"
must ringback disk snapshot delete -f qcow2 /scratch/snap.img one
image_checks qcow2 /scratch/snap.img
