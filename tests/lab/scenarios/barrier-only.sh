# what: barrier offered alone (and so no indirect descriptors): the guest uses it
# needs: ringback
# timeout: 90
backend_restart --set ordering=barrier
leaks_daemon_restarted
img=$(image disk 64)
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "dmesg | grep blkfront.*xvda" | tee $CTL/front.out
grep -q 'xvda: barrier: enabled' $CTL/front.out || fail "the frontend does not say barrier: enabled"
grep -q 'indirect descriptors: disabled' $CTL/front.out || fail "indirect is offered beside barrier alone: blkfront BUGs on it"
fs_round g /dev/xvda 8
above "barriers" 0 "$(stat_sum g xvda barriers)"
same_bytes g xvda "$img"
guest_stop g
must e2fsck -fn "$img"
backend_restart
leaks_daemon_restarted
