# what: limits and a log of changed blocks of a guest's second disk: set at attach, changed live; a backup by the log equals the disk
# needs: ringback
# timeout: 150
img=$(image disk 32)
MEM=640 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
second=$(image second 64)
cp "$second" /scratch/backup.img
rm -f /scratch/first.log /scratch/next.log
must ringback attach blk "$(xl domid g)" xvdb "raw:$second" --set iops_write=100 --set changed_block_log=/scratch/first.log
within "xvdb in the guest" 3000 g g "test -b /dev/xvdb"
writes() { gm g "dd if=/dev/urandom of=/dev/xvdb bs=4k count=$1 seek=$2 oflag=direct 2>/dev/null"; }
t0=$(ms)
writes 300 100
above "300 writes at 100 a second take (ms)" 2500 $(($(ms) - t0))
must ringback set "$(xl domid g)/xvdb" iops_write 0
gm g "dd if=/dev/urandom of=/dev/xvdb bs=64k count=100 seek=300 oflag=direct 2>/dev/null"
must ringback changed-log start "$(xl domid g)/xvdb" /scratch/next.log
writes 50 8000
must ringback detach blk "$(xl domid g)" xvdb
for log in first next; do
  must ringback changed-log show /scratch/$log.log > $CTL/log
  grep -q '^exact: yes' $CTL/log || fail "$log.log: $(grep exact $CTL/log)"
  awk 'NF == 2 && $1 ~ /^[0-9]+$/ { print $1 / 65536, $2 / 65536 }' $CTL/log | while read -r at n; do
    dd if="$second" of=/scratch/backup.img bs=64k skip="$at" seek="$at" count="$n" conv=notrunc 2> /dev/null
  done
  above "$log.log: bytes that changed" 0 "$(sed -n 's/^changed: //p' $CTL/log)"
done
same "the backup" "$(sha "$second")" "$(sha /scratch/backup.img)"
guest_stop g
rm -f /scratch/*.log
