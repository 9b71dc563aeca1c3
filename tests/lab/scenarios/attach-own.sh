# what: ringback attach and detach, without a toolstack; nothing left behind while the guest goes on
# needs: ringback
# timeout: 120
img=$(image disk 32)
VCPUS=2 MEM=640 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
second=$(image second 32)
round() {
  must ringback attach blk "$(xl domid g)" xvdb "raw:$second"
  within "xvdb in the guest" 3000 g g "test -b /dev/xvdb"
  gm g "head -c 8388608 /dev/urandom > /tmp/r && dd if=/tmp/r of=/dev/xvdb bs=256k oflag=direct 2>/dev/null && dd if=/dev/xvdb bs=256k count=32 iflag=direct 2>/dev/null | cmp - /tmp/r"
  same_bytes g xvdb "$second"
  must ringback detach blk "$(xl domid g)" xvdb
  within "no xvdb in the guest" 2000 g g "test ! -e /sys/block/xvdb"
}
round # the first time may start what the backend keeps
mkdir -p $CTL/outer && cp $CTL/*.before $CTL/outer/
leaks_before
round
leaks_after || fail "left behind by a detached disk: $(head -n 1 $CTL/leaks)"
cp $CTL/outer/*.before $CTL/
gm g "dd if=/dev/xvda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null"
guest_stop g
