# what: an NBD server's export as the disk: a QCOW2 image that `ringback export nbd` serves
# needs: ringback
# timeout: 150
must ringback disk create -f qcow2 /scratch/nbd.img 96M
ringback export nbd --socket /scratch/nbd.sock -f qcow2 /scratch/nbd.img > $CTL/export.out 2>&1 &
server=$!
trap 'kill $server 2> /dev/null' EXIT
for _ in $(seq 100); do [ -S /scratch/nbd.sock ] && break; sleep 0.1; done
VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda nbd:unix:/scratch/nbd.sock)
guest_start g
features g xvda 2
fs_round g /dev/xvda 8
image_bytes g xvda
guest_stop g
kill $server && wait $server || fail "the server ended with status $?: $(cat $CTL/export.out)"
image_checks qcow2 /scratch/nbd.img
image_equals_guest qcow2 /scratch/nbd.img
rm -f /scratch/nbd.sock
