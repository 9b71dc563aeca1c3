# what: two guests at once, one destroyed while the other does verified I/O
# timeout: 120
a=$(image a 64)
b=$(image b 32)
TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$a")
guest_start a
TOOLS=base VCPUS=1 CMDLINE= MEM=256 DISK1=$(disk xvda "raw:$b")
guest_start b
g_send a "sh /lab/fio.sh rand4k-d32 /dev/xvda"
job=$G_ID
g_send b "while dd if=/dev/zero of=/dev/xvda bs=64k oflag=direct count=200; do :; done 2>/dev/null"
sleep 1
guest_destroy b
g_wait a "$job" 60 || fail "fio in the other guest: status $?"
same_bytes a xvda "$a"
guest_stop a
