# what: an image as a device of dom0's own nbd driver (`ringback disk connect`), a file system on it, and the same by tap-ctl
# needs: ringback
# timeout: 60
must modprobe nbd nbds_max=2
trap 'rmmod nbd 2> /dev/null' EXIT
must ringback disk create -f qcow2 /scratch/device.img 96M
device=$(ringback disk connect -f qcow2 /scratch/device.img) || fail "disk connect: $device"
same "its size" 100663296 "$(blockdev --getsize64 "$device")"
must mkfs.ext4 -q "$device"
head -c 8388608 /dev/urandom > $CTL/pattern
mkdir -p $CTL/mnt
must mount -t ext4 "$device" $CTL/mnt
must cp $CTL/pattern $CTL/mnt/pattern
ringback disk disconnect "$device" 2> /dev/null && fail "a mounted device was disconnected"
must umount $CTL/mnt
must e2fsck -fn "$device"
must dd if=$CTL/pattern of="$device" bs=1M seek=80 conv=fsync
must ringback disk disconnect "$device"
image_checks qcow2 /scratch/device.img
must ringback disk convert -f qcow2 -O raw /scratch/device.img /scratch/device-raw.img
must cmp -n 8388608 $CTL/pattern /scratch/device-raw.img 0 83886080
ln -sf /lab/bin/ringback $CTL/tap-ctl
device=$($CTL/tap-ctl create -d /dev/nbd1 -R -a aio:/scratch/device-raw.img) || fail "tap-ctl create: $device"
same "the device" /dev/nbd1 "$device"
same "its bytes" "$(sha /scratch/device-raw.img)" "$(sha "$device")"
row=$($CTL/tap-ctl list)
pid=${row#pid=}; pid=${pid%% *}
same "the row" "pid=$pid minor=0 state=0 args=aio:/scratch/device-raw.img" "$row"
must ringback disk disconnect "$device"
same "what is left" "" "$($CTL/tap-ctl list)"
