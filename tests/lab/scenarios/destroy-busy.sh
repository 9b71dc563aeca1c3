# what: xl destroy in the middle of I/O, PV and PVH
# timeout: 120
for t in pv pvh; do
  img=$(image disk 64)
  TYPE=$t TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
  guest_start g
  g_send g "while fio --name=w --filename=/dev/xvda --rw=randrw --bs=16k --iodepth=32 --ioengine=libaio --direct=1 --size=32M > /dev/null; do :; done"
  sleep 2
  guest_destroy g
  leaks_after || fail "left behind by $t: $(head -n 1 $CTL/leaks)"
done
