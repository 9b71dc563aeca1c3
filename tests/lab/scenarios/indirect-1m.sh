# what: 1 MiB in one request (xen_blkfront.max_indirect_segments=256)
# timeout: 90
# One page of ring: with 16, blkfront would set 512 MiB of pages aside for 256 segments.
img=$(image disk 64)
CMDLINE="xen_blkfront.max_indirect_segments=256" DISK1=$(disk xvda "raw:$img")
guest_start g
same "max_hw_sectors_kb" 1024 "$(g g "cat /sys/block/xvda/queue/max_hw_sectors_kb" | tail -n 1)"
gm g "echo 1024 > /sys/block/xvda/queue/max_sectors_kb"
before=$(node "$(backend_node g xvda)/state")
same "state" 4 "$before"
gm g "head -c 16777216 /dev/urandom > /tmp/r; set -- \$(cat /sys/block/xvda/stat); echo \$5 > /tmp/w0; dd if=/tmp/r of=/dev/xvda bs=1M oflag=direct 2>&1"
# 16 writes of 1 MiB as the guest's block layer counts them: not split
same "requests for 16 MiB" 16 "$(g g 'set -- $(cat /sys/block/xvda/stat); echo $(($5 - $(cat /tmp/w0)))' | tail -n 1)"
gm g "dd if=/dev/xvda bs=1M count=16 iflag=direct 2>/dev/null | cmp - /tmp/r"
[ "$BACKEND" != ringback ] || above "indirect requests" 31 "$(stat_sum g xvda indirect)"
same_bytes g xvda "$img"
guest_stop g
