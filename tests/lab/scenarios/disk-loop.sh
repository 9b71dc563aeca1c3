# what: a loop device as the disk
# timeout: 90
img=$(image loop 64)
dev=$(losetup -f --show "$img") || fail "losetup"
trap 'losetup -d $dev' EXIT
CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$dev")
guest_start g
above "discard_max_bytes" 0 "$(g g "cat /sys/block/xvda/queue/discard_max_bytes" | tail -n 1)"
fs_round g /dev/xvda 6
same_bytes g xvda "$dev"
guest_stop g
must e2fsck -fn "$dev"
