# what: an LVM volume as the disk
# timeout: 90
# No udev in dom0: LVM makes its device nodes itself.
lv() { lvm "$@" --config 'activation{udev_sync=0 udev_rules=0} devices{use_devicesfile=0 obtain_device_list_from_udev=0} backup{backup=0 archive=0}'; }
img=$(image pv 96)
dev=$(losetup -f --show "$img") || fail "losetup"
trap 'lv vgchange -an ringback; losetup -d $dev' EXIT
must lv pvcreate -q -y "$dev"
must lv vgcreate -q ringback "$dev"
must lv lvcreate -q -y -Wn -Zn -L 64M -n disk ringback
vol=/dev/mapper/ringback-disk
[ -b $vol ] || fail "no $vol: $(ls /dev/mapper)"
CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$vol")
guest_start g
same "sectors" 131072 "$(g g "cat /sys/block/xvda/size" | tail -n 1)"
fs_round g /dev/xvda 6
same_bytes g xvda $vol
guest_stop g
must e2fsck -fn $vol
