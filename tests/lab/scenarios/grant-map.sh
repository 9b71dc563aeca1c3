# what: pages mapped for one request and unmapped before its answer (grants=map)
# needs: ringback
# timeout: 120
backend_restart --set grants=map --set cache=writeback
leaks_daemon_restarted
img=$(image disk 64)
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "dmesg | grep blkfront.*xvda" | tee $CTL/front.out
grep -q 'persistent grants: disabled' $CTL/front.out || fail "persistent grants are not disabled"
fs_round g /dev/xvda 8
above "grants mapped" 1000 "$(stat_sum g xvda grants_mapped)"
same "persistent hits" 0 "$(stat_sum g xvda hits)"
same_bytes g xvda "$img"
guest_stop g
must e2fsck -fn "$img"
backend_restart
leaks_daemon_restarted
