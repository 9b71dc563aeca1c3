# what: kill -9 of the backend of an idle disk; a new one takes it over and the guest goes on
# needs: ringback
# timeout: 120
img=$(image disk 64)
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda "raw:$img")
guest_start g
gm g "mkfs.ext4 -q -F /dev/xvda && mount -t ext4 /dev/xvda /mnt && head -c 8000000 /dev/urandom > /mnt/f && sha256sum /mnt/f > /tmp/sum && sync"
for i in 1 2; do
  old=$(backend_pids "$(xl domid g)")
  [ -n "$old" ] || fail "no backend process for the guest"
  must kill -9 $old
  another() { p=$(backend_pids "$(xl domid g)"); [ -n "$p" ] && [ "$p" != "$old" ]; }
  within "another backend process" 3000 another
  gm g "echo 3 > /proc/sys/vm/drop_caches && sha256sum -c /tmp/sum && head -c 4000000 /dev/urandom > /mnt/g$i && sha256sum /mnt/g$i >> /tmp/sum && sync" 20
done
step "power-off with the second backend"
gm g "umount /mnt && e2fsck -fn /dev/xvda"
same_bytes g xvda "$img"
guest_stop g
step "destroy with a killed backend"
guest_start g
must kill -9 $(backend_pids "$(xl domid g)")
guest_destroy g
