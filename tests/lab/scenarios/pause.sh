# what: xl pause and unpause during verified I/O
# timeout: 90
img=$(image disk 64)
TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
g_send g "sh /lab/fio.sh rand4k-d32 /dev/xvda"
job=$G_ID
usleep 700000
for i in 1 2 3; do
  must xl pause g
  usleep 700000
  must xl unpause g
  usleep 300000
done
g_wait g "$job" 60 || fail "fio after the pauses: status $?"
same_bytes g xvda "$img"
guest_stop g
