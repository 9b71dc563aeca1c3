# what: kill -9 of the backend at ten instants of each of snapshot, coalesce, stream, mirror, commit and resize, while fio verifies; begun again, each job completes
# needs: ringback
# when: named
# timeout: 900
# So that there is always something in flight, and the jobs have their share of two cores.
backend_restart --set delay_us=20000-60000
leaks_daemon_restarted
raw=$(image raw 32)
head -c 33554432 /dev/urandom > "$raw"
must ringback disk convert -O qcow2 "$raw" /scratch/base.img
TOOLS=fio VCPUS=2 CMDLINE=$BLKFRONT DISK1=$(disk xvda qcow2:/scratch/base.img)
guest_start g
id=$(xl domid g)
D=$id/xvda
second="dd if=/dev/xvda bs=1M skip=16 count=16 2>/dev/null | sha256sum"
wanted=$(g g "$second" | grep -oE '^[0-9a-f]{64}')
gm g "sh /lab/verify.sh start /dev/xvda --iodepth=32"
kills_begin "$id"
inside=0
name() { node "$(backend_node g xvda)/params"; }
# killed MILLISECONDS WORDS...: a job whose backend is killed within that time. $told: whether it was said to be done.
killed() {
  most=$1; shift
  ringback disk "$@" > $CTL/job.out 2>&1 &
  job=$!
  usleep $(($(random "$most") * 1000))
  backend_kill
  told=yes
  wait $job || { told=no; inside=$((inside + 1)); }
  echo "$*: $([ $told = yes ] && echo done before the kill || tail -n 1 $CTL/job.out)"
  within "a backend after the kill" 20000 backend_serves
  running g || fail "fio has ended during: $*"
}
# again SIGN WORDS...: the same job once more; an error with that sign says that it was done
again() {
  sign=$1; shift
  if ringback disk "$@" > $CTL/job.out 2>&1; then
    [ $told = no ] || fail "it was said to be done, and was not: $*"
  else
    grep -q "$sign" $CTL/job.out || fail "$*: $(cat $CTL/job.out)"
  fi
}
# moved NAME WORDS...: the disk's name is that, or the job is begun again and then it is
moved() {
  to=$1; shift
  if [ "$(name)" != "$to" ]; then
    [ $told = no ] || fail "it was said to be done, and the disk is $(name): $*"
    must ringback disk "$@"
  fi
  same "the disk's name" "$to" "$(name)"
}
ROUNDS="1 2 3 4 5 6 7 8 9 10"
step "snapshots"
for n in $ROUNDS; do
  killed 250 snapshot create --live "$D" --overlay /scratch/s$n.img
  moved qcow2:/scratch/s$n.img snapshot create --live "$D" --overlay /scratch/s$n.img
done
must ringback disk snapshot create --live "$D" --overlay /scratch/top.img
step "coalesce"
for n in $ROUNDS; do
  killed 500 coalesce --live "$D" /scratch/s$n.img
  again "does not build on it" coalesce --live "$D" /scratch/s$n.img
  rm /scratch/s$n.img
done
step "stream"
for n in $ROUNDS; do
  must ringback disk snapshot create --live "$D" --overlay /scratch/t$n.img
  killed 1200 stream --live "$D"
  again "nothing between" stream --live "$D"
  [ ! -e /scratch/t$((n - 1)).img ] || rm /scratch/t$((n - 1)).img
done
rm /scratch/base.img /scratch/top.img
step "mirror"
for n in $ROUNDS; do
  format=$([ $((n % 2)) = 0 ] && echo raw || echo qcow2)
  killed 1200 mirror --live "$D" --switch -O $format /scratch/m$n.img
  # Half a mirror is begun anew: into an empty file.
  [ "$(name)" = $format:/scratch/m$n.img ] || rm -f /scratch/m$n.img
  moved $format:/scratch/m$n.img mirror --live "$D" --switch -O $format /scratch/m$n.img
  [ ! -e /scratch/m$((n - 1)).img ] || rm /scratch/m$((n - 1)).img
done
rm /scratch/t10.img
step "commit"
base=$(name)
for n in $ROUNDS; do
  must ringback disk snapshot create --live "$D" --overlay /scratch/c$n.img
  killed 700 commit --live "$D"
  moved "$base" commit --live "$D"
  # A kill may leave clusters that nothing uses, and nothing worse.
  must ringback disk check -f qcow2 -r leaks /scratch/c$n.img
  must ringback disk check -f qcow2 /scratch/c$n.img
  rm /scratch/c$n.img
done
step "resize"
for n in $ROUNDS; do
  killed 250 resize --live "$D" $((32 + n))M
  must ringback disk resize --live "$D" $((32 + n))M
  within "the guest's disk grows" 4000 g g "test \$(cat /sys/block/xvda/size) = $(((32 + n) * 2048))"
done
above "kills in the middle of a job" 20 "$inside"
above "requests that were served again" 60 "$(replays)"
gm g "sh /lab/verify.sh stop /dev/xvda" 120 > $CTL/verify.out
cat $CTL/verify.out
above "verified rounds" 1 "$(sed -n 's/^verified: \([0-9]*\) .*/\1/p' $CTL/verify.out)"
guest_log_is_clean g
same "what fio did not write" "$wanted" "$(g g "$second" | grep -oE '^[0-9a-f]{64}')"
image_bytes g xvda
guest_stop g
image_equals_guest raw /scratch/m10.img
backend_restart
leaks_daemon_restarted
