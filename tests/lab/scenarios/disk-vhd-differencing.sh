# what: a VHD differencing disk over a dynamic one: both check clean, the bytes are right, the parent is as it was
# timeout: 150
# needs: ringback
raw=$(image raw 96)
mkdir -p /scratch/golden && head -c 3000000 /dev/urandom > /scratch/golden/file
must mkfs.ext4 -q -F -d /scratch/golden "$raw"
wanted=$(sha /scratch/golden/file)
must ringback disk convert -f raw -O vhd "$raw" /scratch/parent.img
before=$(sha /scratch/parent.img)
must ringback disk create -f vhd -b parent.img -F vhd /scratch/child.img
VCPUS=1 TYPE=pvh CMDLINE=$BLKFRONT DISK1=$(disk xvda vhd:/scratch/child.img)
guest_start g
features g xvda 1
gm g "mkdir -p /mnt/a && mount -t ext4 /dev/xvda /mnt/a"
same "the parent's file" "$wanted" "$(g g "sha256sum < /mnt/a/file" | grep -oE '^[0-9a-f]{64}')"
gm g "head -c 20000000 /dev/urandom > /mnt/a/new && umount /mnt/a"
fs_round g /dev/xvda 8
image_bytes g xvda
guest_stop g
image_checks vhd /scratch/child.img
image_equals_guest vhd /scratch/child.img
same "the parent" "$before" "$(sha /scratch/parent.img)"
rm -rf /scratch/golden
