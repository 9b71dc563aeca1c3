# what: xl block-attach and block-detach while the guest runs, and nothing left behind while it goes on
# timeout: 120
img=$(image disk 32)
VCPUS=2 MEM=640 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
second=$(image second 32)
round() {
  must xl block-attach g "$(disk xvdb "raw:$second")"
  node_b=$(backend_node g xvdb)
  within "xvdb is connected" 3000 state_is "$node_b" 4
  within "xvdb in the guest" 3000 g g "test -b /dev/xvdb"
  gm g "head -c 8388608 /dev/urandom > /tmp/r && dd if=/tmp/r of=/dev/xvdb bs=256k oflag=direct 2>/dev/null && dd if=/dev/xvdb bs=256k count=32 iflag=direct 2>/dev/null | cmp - /tmp/r"
  same_bytes g xvdb "$second"
  t0=$(ms)
  must xl block-detach g xvdb
  in_time "xl block-detach" 2000 $(($(ms) - t0))
  within "no xvdb in the guest" 2000 g g "test ! -e /sys/block/xvdb"
  same "backend node" "" "$(node "$node_b/state")"
}
round # the first time may start what the backend keeps
mkdir -p $CTL/outer && cp $CTL/*.before $CTL/outer/
leaks_before
round
round
leaks_after || fail "left behind by a detached disk: $(head -n 1 $CTL/leaks)"
cp $CTL/outer/*.before $CTL/
gm g "dd if=/dev/xvda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null"
guest_stop g
