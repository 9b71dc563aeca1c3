# what: a frontend without persistent grants (xen_blkfront.feature_persistent=0): grant copy
# timeout: 90
img=$(image disk 64)
VCPUS=2 CMDLINE="$BLKFRONT xen_blkfront.feature_persistent=0" DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "dmesg | grep blkfront.*xvda" | tee $CTL/front.out
grep -q 'persistent grants: disabled' $CTL/front.out || fail "persistent grants are not disabled"
fs_round g /dev/xvda 8
if [ "$BACKEND" = ringback ]; then
  above "grants copied" 0 "$(stat_sum g xvda grants_copied)"
  same "persistent hits" 0 "$(stat_sum g xvda hits)"
fi
same_bytes g xvda "$img"
guest_stop g
must e2fsck -fn "$img"
