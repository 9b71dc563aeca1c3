# what: xl reboot and xl shutdown; the data is there afterwards
# timeout: 120
img=$(image disk 64)
CMDLINE=$BLKFRONT VCPUS=2 DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && head -c 4000000 /dev/urandom > /mnt/f && sha256sum /mnt/f > /mnt/sum && umount /mnt"
lines=$(wc -l < $CTL/guest-g.log)
old=$(xl domid g)
step "xl reboot"
must xl reboot g
within "domain $old is gone" 3000 domain_gone "$old"
guest_never_waited g
guest_ready g "$lines" "$(scaled 40000)"
[ "$(xl domid g)" != "$old" ] || fail "the domain did not change"
gm g "mount -t ext4 /dev/xvda /mnt && sha256sum -c /mnt/sum && umount /mnt && e2fsck -fn /dev/xvda"
step "xl shutdown"
id=$(xl domid g)
t0=$(ms)
must xl shutdown -w g
echo "ok: xl shutdown -w after $(($(ms) - t0)) ms"
within "domain $id is gone" 1000 domain_gone "$id"
guest_never_waited g
