# what: snapshots, coalesce, stream, mirror with switch, commit, pause and resize of a disk that fio writes and verifies all the while
# timeout: 300
# needs: ringback
raw=$(image raw 64)
head -c 50331648 /dev/urandom > "$raw"; truncate -s 64M "$raw"
must ringback disk convert -O qcow2 "$raw" /scratch/base.img
TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda qcow2:/scratch/base.img)
guest_start g
D=$(xl domid g)/xvda
second="dd if=/dev/xvda bs=1M skip=32 count=16 2>/dev/null | sha256sum"
wanted=$(g g "$second" | grep -oE '^[0-9a-f]{64}')
gm g "sh /lab/verify.sh start /dev/xvda"
rounds() { g g "cat /tmp/rounds" | grep -oE '^[0-9]+'; }
running() { g g "test ! -e /tmp/stopped && test ! -e /tmp/wrong" > /dev/null; }
# live WORDS...: a job, from its begin to its end with fio at work
live() {
  step "$*"
  running || fail "fio does not run before: $*"
  must ringback disk "$@"
  running || fail "fio has ended during: $*"
}
for n in one two three; do
  live snapshot create --live "$D" --overlay /scratch/$n.img
  sleep 1
done
live coalesce --live "$D" /scratch/two.img
live coalesce --live "$D" /scratch/one.img
# Nobody needs them any more.
rm /scratch/one.img /scratch/two.img
live stream --live "$D"
live mirror --live "$D" --switch -O raw /scratch/copy.img
same "the disk's name" raw:/scratch/copy.img "$(node "$(backend_node g xvda)/params")"
live snapshot create --live "$D" --overlay /scratch/four.img
live commit --live "$D"
live pause --live "$D"
before=$(rounds)
sleep 2
after=$(rounds)
[ $((after - before)) -le 1 ] || fail "the guest went on while paused: $before, then $after"
live resume --live "$D"
live resize --live "$D" 96M
within "the guest's disk grows" 3000 g g "test \$(cat /sys/block/xvda/size) = 196608"
gm g "sh /lab/verify.sh stop /dev/xvda" 120 > $CTL/verify.out
cat $CTL/verify.out
above "verified rounds" 1 "$(sed -n 's/^verified: \([0-9]*\) .*/\1/p' $CTL/verify.out)"
same "what fio did not write" "$wanted" "$(g g "$second" | grep -oE '^[0-9a-f]{64}')"
image_bytes g xvda
guest_stop g
image_equals_guest raw /scratch/copy.img
image_checks qcow2 /scratch/three.img
