# what: a CD-ROM drive: read-only and removable in the guest; its disc ejected and another one inserted
# needs: ringback
# timeout: 120
img=$(image disk 32)
a=$(image disc-a 8)
b=$(image disc-b 12)
head -c 8388608 /dev/urandom > "$a"
head -c 12582912 /dev/urandom > "$b"
DISK1=$(disk xvda "raw:$img")
DISK2="format=raw,script=block-ringback,devtype=cdrom,vdev=xvdc,access=ro,target=raw:$a"
guest_start g
same "read-only" 1 "$(g g 'cat /sys/block/xvdc/ro' | tail -n 1)"
same "removable" 1 "$(g g 'cat /sys/block/xvdc/removable' | tail -n 1)"
same "info: CD-ROM, removable and read-only" 7 "$(node "$(backend_node g xvdc)/info")"
same_bytes g xvdc "$a"
g g "dd if=/dev/zero of=/dev/xvdc bs=4k count=1 oflag=direct 2>&1" && fail "the disc could be written"
step "eject"
must ringback cd eject "$(xl domid g)" xvdc
within "no disc in the guest" 2000 g g "test ! -b /dev/xvdc || ! dd if=/dev/xvdc of=/dev/null bs=4k count=1 iflag=direct 2>/dev/null"
step "insert"
must ringback cd insert "$(xl domid g)" xvdc "raw:$b"
within "the other disc in the guest" 3000 g g 'test "$(cat /sys/block/xvdc/size)" = 24576'
same_bytes g xvdc "$b"
gm g "dd if=/dev/xvda of=/dev/null bs=1M count=8 iflag=direct 2>/dev/null"
guest_stop g
